"""What Open-Reasoner-Zero (arXiv:2503.24290) logs of its samples: repetition, reflection words, lengths, pass@n.

Its repeat score is the share of a text's substrings that occurred before, which takes a suffix array for each text.
Here it is the share of token n-grams of one length: 0 without repetition, near 1 for an endless loop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from megatron_oreal.observability.evaluation_statistics import pass_at_k
from megatron_oreal.types import Group, Sample

REFLECTION_WORDS = ("wait", "recheck", "retry", "alternatively", "however")
# The look-behind comes last: a pattern that begins with plain letters is searched for several times faster.
REFLECTION = tuple(re.compile(rf"{word}(?<!\w{word})\b") for word in REFLECTION_WORDS)
NGRAM_TOKENS = 16
MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that no token's bits are lost


def text_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of all samples; those about correct or incorrect answers are left out where there are none.

    Only the rank that knows the texts (`Sample.response_text`) counts reflection words.
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


def repetition(token_ids: Sequence[int], ngram_tokens: int = NGRAM_TOKENS) -> float:
    """The share of n-grams that occurred before in the same response, in [0, 1); 0 for a shorter one."""
    tokens = np.asarray(token_ids, dtype=np.uint64)
    count = tokens.size - ngram_tokens + 1
    if count < 1:
        return 0.0
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(ngram_tokens):  # a polynomial in the tokens, modulo 2^64
        hashes = hashes * np.uint64(MULTIPLIER) + tokens[offset : offset + count] + np.uint64(1)
    return 1.0 - np.unique(hashes).size / count


def num_reflection_words(text: str) -> int:
    """How often a response turns back on itself: whole words, in any case."""
    lowered = text.lower()
    return sum(len(pattern.findall(lowered)) for pattern in REFLECTION)


def pass_at_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """`reward/pass_at_<n>` for n = 2, 4, ... below the group size: unbiased means over groups with n judged samples."""
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
