"""From prompts to groups of judged samples: requests, generation, verification, and the record on disk."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_oreal.config import AnswerRule
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.answer import ANSWER_REGIONS
from megatron_oreal.rollout.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from megatron_oreal.types import Group, Sample, Verdict


@dataclass(slots=True)
class Sampler:
    """Every rank calls it alike and gets the same groups; the first rank verifies and knows the texts."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    verifier: MathVerifier | None  # None on the other ranks
    require_stop: bool  # a response without a stop is wrong
    stop_strings: tuple[str, ...] = ()  # end a response too, and stay in it
    answer_rule: AnswerRule = "last_box"

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, params: SamplingParams, seed: str
    ) -> list[Group]:
        """`num_samples` a prompt; a sample's seed depends on `seed`, the prompt's place and its own number."""
        requests = [
            GenerationRequest(prompt.token_ids, sample_seed(f"{seed}/{place}/{number}"))
            for place, prompt in enumerate(prompts)
            for number in range(num_samples)
        ]
        generations = iter(self.engine.generate(requests, params))
        groups = [
            Group(prompt.prompt, [self._sample(prompt, next(generations), params) for _ in range(num_samples)])
            for prompt in prompts
        ]
        samples = [(sample, group.prompt.answer) for group in groups for sample in group.samples]
        for (sample, _), verdict in zip(samples, self._verdicts(samples), strict=True):
            sample.verdict = verdict
        return groups

    def _sample(self, prompt: EncodedPrompt, generation: Generation, params: SamplingParams) -> Sample:
        num_tokens = tokens_to_stop_string(generation.response_ids, self.stop_strings, self.tokenizer)
        stopped_by_token = num_tokens is None and generation.finish_reason == "stop"
        response_ids = generation.response_ids[:num_tokens]
        shown_ids = response_ids[:-1] if stopped_by_token else response_ids
        return Sample(
            prompt_id=prompt.prompt.id,
            prompt_ids=prompt.token_ids,
            response_ids=response_ids,
            response_text=self.tokenizer.decode(shown_ids) if self.verifier else "",
            rollout_logprobs=generation.rollout_logprobs[:num_tokens],
            model_logprobs=generation.model_logprobs[:num_tokens],
            finish_reason=generation.finish_reason if num_tokens is None else "stop",
            policy_version=self.engine.version,
        )

    def _verdicts(self, samples: Sequence[tuple[Sample, str]]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        if self.verifier is not None:
            verdicts = self._verify(self.verifier, samples)
        if dist.get_world_size() == 1:
            return verdicts
        shared = [verdicts]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _verify(self, verifier: MathVerifier, samples: Sequence[tuple[Sample, str]]) -> list[Verdict]:
        """A response that was cut is not sent to the verifier when it needs its stop token."""
        is_cut = [self.require_stop and sample.finish_reason != "stop" for sample, _ in samples]
        region = ANSWER_REGIONS[self.answer_rule]
        pairs = [
            (region(sample.response_text), answer)
            for (sample, answer), cut in zip(samples, is_cut, strict=True)
            if not cut
        ]
        judged = iter(verifier.verify_many(pairs))
        return [Verdict(0.0, "too_long", None) if cut else next(judged) for cut in is_cut]


def tokens_to_stop_string(response_ids: Sequence[int], stop_strings: Sequence[str], tokenizer: Tokenizer) -> int | None:
    """The fewest tokens whose text holds a stop string; None when there is none. What follows was never asked for."""

    def holds_stop(count: int) -> bool:
        text = tokenizer.decode(response_ids[:count])
        return any(stop in text for stop in stop_strings)

    if not stop_strings or not holds_stop(len(response_ids)):
        return None
    # A longer text holds what a shorter one holds.
    return bisect.bisect_left(range(len(response_ids)), True, key=holds_stop)


def sample_seed(key: str) -> int:
    """A 63-bit seed, the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def rollout_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards, lengths and verdicts of all samples, before any selection."""
    samples = [sample for group in groups for sample in group.samples]
    judged = [sample for sample in samples if sample.is_judged]
    lengths = [len(sample.response_ids) for sample in samples]
    statuses = [sample.verdict.status for sample in samples if sample.verdict is not None]
    pass_rates = [group.pass_rate for group in groups if group.judged_samples]
    return {
        "reward/mean": sum(sample.is_correct for sample in judged) / max(1, len(judged)),
        "reward/groups_mixed": sum(0 < rate < 1 for rate in pass_rates),
        "reward/groups_all_correct": sum(rate == 1 for rate in pass_rates),
        "reward/groups_all_incorrect": sum(rate == 0 for rate in pass_rates),
        "reward/groups_unjudged": len(groups) - len(pass_rates),
        "reward/pass_at_group_size": sum(rate > 0 for rate in pass_rates) / max(1, len(pass_rates)),
        "rollout/num_samples": len(samples),
        "rollout/num_tokens": sum(lengths),
        "rollout/length_mean": sum(lengths) / len(lengths),
        "rollout/length_max": max(lengths),
        "rollout/length_limit_share": sum(sample.finish_reason == "length" for sample in samples) / len(samples),
        "rollout/logprob_mean": sum(sum(sample.rollout_logprobs) for sample in samples) / max(1, sum(lengths)),
        "verifier/no_answer": statuses.count("no_answer"),
        "verifier/rejected": statuses.count("rejected"),
        "verifier/timeout": statuses.count("timeout"),
        "verifier/crash": statuses.count("crash"),
    }


def write_rollouts(path: Path, groups: Sequence[Group]) -> None:
    """One JSON object a sample; the file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, "".join(json.dumps(sample_row(group, sample)) + "\n" for group in groups for sample in group.samples)
    )


def sample_row(group: Group, sample: Sample) -> dict[str, object]:
    verdict = sample.verdict
    return {
        "prompt_id": sample.prompt_id,
        "prompt": group.prompt.messages[-1].content,
        "answer": group.prompt.answer,
        "response": sample.response_text,
        "status": verdict.status if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "reward": verdict.reward if verdict else None,
        "num_tokens": len(sample.response_ids),
        "logprob": round(sum(sample.rollout_logprobs), 6),
        "finish_reason": sample.finish_reason,
        "policy_version": sample.policy_version,
    }
