"""Computes the metrics of a step's samples: rewards, lengths, verdicts, age, repetition, reflection words, pass@n.

`text_metrics` measures the same things as Open-Reasoner-Zero (arXiv:2503.24290), but defines two of them differently,
so that the numbers are not comparable. Its repeat score uses all substrings of a text, with a suffix array for each.
`rollout/repetition_*` is the share of token n-grams of one length that occurred before: 0 without repetition, near 1
for an endless loop. Its reflection score counts a pattern with fixed case and punctuation. `rollout/reflection_*`
counts whole words in upper or lower case. This module does not compute its deviations and histograms of lengths.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from megatron_oreal.statistics import pass_at_k
from megatron_oreal.types import Group, Int32Array, JudgeOpinion, Sample

REFLECTION_WORDS = ("wait", "recheck", "retry", "alternatively", "however")
# The look-behind comes last, because a search for a pattern that begins with plain letters is several times faster.
REFLECTION = tuple(re.compile(rf"{word}(?<!\w{word})\b") for word in REFLECTION_WORDS)
NGRAM_TOKENS = 16
# (whether the rules accepted the answer, the judge's reply) -> the name of the count
JUDGED_AS: dict[tuple[bool, JudgeOpinion], str] = {
    (False, "correct"): "overruled",
    (False, "incorrect"): "agreed",
    (False, "failed"): "failed",
    (True, "correct"): "audit_agreed",
    (True, "incorrect"): "audit_disagreed",
    (True, "failed"): "audit_failed",
}
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that multiplication keeps all bits of a token


def text_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns metrics of all samples. Leaves out those of correct or of incorrect answers if there are no such answers.

    Reflection words are counted in `Sample.response_text`, which only the first rank has.
    """
    samples = [sample for group in groups for sample in group.samples]
    repetitions = [repetition(sample.response_ids) for sample in samples]
    reflections = [num_reflection_words(sample.response_text) for sample in samples]
    reflective = [sample for sample, count in zip(samples, reflections, strict=True) if count]
    correct = [sample for sample in samples if sample.is_correct]
    incorrect = [sample for sample in samples if sample.is_judged and not sample.is_correct]
    metrics: dict[str, float] = {
        "rollout/num_not_stopped": sum(sample.finish_reason != "stop" for sample in samples),
        "rollout/repetition_mean": mean(repetitions),
        "rollout/repetition_max": max(repetitions),
        "rollout/reflection_words_mean": mean(reflections),
        "rollout/reflection_share": len(reflective) / len(samples),
    }
    lengths = {
        "correct": correct,
        "incorrect": incorrect,
        "reflection_correct": [sample for sample in reflective if sample.is_correct],
    }
    for name, chosen in lengths.items():
        if chosen:
            metrics[f"rollout/length_{name}_mean"] = mean_length(chosen)
    return metrics | pass_at_metrics(groups)


def repetition(token_ids: Sequence[int] | Int32Array, ngram_tokens: int = NGRAM_TOKENS) -> float:
    """Returns the share of n-grams that occurred before in the response, in [0, 1); 0 for a response without n-grams.

    Example: of the 3-grams 123, 231, 312, 123 in 1 2 3 1 2 3, one of four occurred before: 0.25.
    """
    tokens = np.asarray(token_ids, dtype=np.uint64)
    count = tokens.size - ngram_tokens + 1
    if count < 1:
        return 0.0
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(ngram_tokens):  # each n-gram's hash is a polynomial in its tokens, modulo 2^64
        hashes = hashes * np.uint64(MULTIPLIER) + tokens[offset : offset + count] + np.uint64(1)
    return 1.0 - np.unique(hashes).size / count


def num_reflection_words(text: str) -> int:
    """Counts words with which a response questions its own reasoning: whole words, in upper or lower case."""
    lowered = text.lower()
    return sum(len(pattern.findall(lowered)) for pattern in REFLECTION)


def pass_at_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns `reward/pass_at_<n>` for n = 2, 4, ... below the group size."""
    judged = [group.judged_samples for group in groups]
    counts = [(sum(sample.is_correct for sample in samples), len(samples)) for samples in judged]
    largest = max((len(group.samples) for group in groups), default=0)
    metrics = {}
    n = 2
    while n < largest:
        values = [pass_at_k(num_correct, size, n) for num_correct, size in counts if size >= n]
        if values:
            metrics[f"reward/pass_at_{n}"] = mean(values)
        n *= 2
    return metrics


def mean_length(samples: Sequence[Sample]) -> float:
    return mean([len(sample.response_ids) for sample in samples])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


Number = TypeVar("Number", int, float)


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns rewards, lengths and verdicts of all samples, before the algorithm selects those to train on."""
    samples = [sample for group in groups for sample in group.samples]
    judged = [sample for sample in samples if sample.is_judged]
    lengths = [len(sample.response_ids) for sample in samples]
    known = [sample for sample in samples if len(sample.rollout_logprobs)]
    statuses = [sample.verdict.status for sample in samples if sample.verdict is not None]
    pass_rates = [group.pass_rate for group in groups if group.judged_samples]
    metrics = {
        "reward/mean": sum(sample.is_correct for sample in judged) / max(1, len(judged)),
        "reward/groups_mixed": sum(0 < rate < 1 for rate in pass_rates),
        "reward/groups_all_correct": sum(rate == 1 for rate in pass_rates),
        "reward/groups_all_incorrect": sum(rate == 0 for rate in pass_rates),
        "reward/groups_unjudged": len(groups) - len(pass_rates),
        "reward/pass_at_group_size": sum(rate > 0 for rate in pass_rates) / max(1, len(pass_rates)),
        "rollout/num_samples": len(samples),
        "rollout/num_tokens": sum(lengths),
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_median": nearest_rank(lengths, 0.5),
        "rollout/length_nine_tenths": nearest_rank(lengths, 0.9),
        "rollout/length_max": max(lengths),
        "rollout/length_limit_share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "verifier/no_answer": statuses.count("no_answer"),
        "verifier/rejected": statuses.count("rejected"),
        "verifier/timeout": statuses.count("timeout"),
        "verifier/crash": statuses.count("crash"),
    }
    for status in ("judge_failed", "reward_failed"):
        if status in statuses:
            metrics[f"verifier/{status}"] = statuses.count(status)
    metrics |= reward_metrics(judged)
    if known:
        metrics["rollout/logprob_mean"] = sum(map(logprob_sum, known)) / sum(len(s.rollout_logprobs) for s in known)
    return metrics


def reward_metrics(judged: Sequence[Sample]) -> dict[str, float]:
    """Returns the rewards if some are neither 0 nor 1; `reward/mean` is the share of correct samples."""
    rewards = [sample.reward for sample in judged]
    if all(reward in (0.0, 1.0) for reward in rewards):
        return {}
    return {"reward/value_mean": mean(rewards), "reward/value_min": min(rewards), "reward/value_max": max(rewards)}


def judge_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Returns counts of the judge's replies for each data set (`Prompt.source`); empty if it was not asked.

    `judge/<data set>/overruled` counts the answers that the rules did not accept and the judge did, `agreed` those that
    neither accepted, and `failed` those without a reply. `audit_agreed`, `audit_disagreed` and `audit_failed` count the
    same among the accepted answers that an audit shows to the judge. Only the first rank has these metrics.
    """
    told = [
        (group.prompt.source or "unnamed", JUDGED_AS[verdict.rules == "correct", verdict.judge])
        for group in groups
        for verdict in (sample.verdict for sample in group.samples)
        if verdict is not None and verdict.judge is not None
    ]
    sources = sorted({source for source, _ in told})
    return {f"judge/{source}/{name}": told.count((source, name)) for source in sources for name in JUDGED_AS.values()}


def logprob_sum(sample: Sample) -> float:
    """Returns the log-prob of the whole response as it was sampled, summed in float64 from first to last token.

    The order is fixed because another order may change the last digit; `np.sum` chooses its own order.
    """
    return 0.0 + float(np.cumsum(sample.rollout_logprobs, dtype=np.float64)[-1])  # 0.0 + -0.0 is 0.0


def nearest_rank(values: Sequence[Number], share: float) -> Number:
    """Returns the smallest value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def staleness_metrics(groups: Sequence[Group], step: int) -> dict[str, float]:
    """Returns the age, in steps before `step`, of the weights that generated each sample's oldest token."""
    ages = [step - sample.policy_version for group in groups for sample in group.samples]
    return {"rollout/staleness_mean": sum(ages) / max(1, len(ages)), "rollout/staleness_max": max(ages, default=0)}
