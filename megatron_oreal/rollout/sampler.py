"""From prompts to groups of judged samples: requests, generation, verification, and the record on disk."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch.distributed as dist

from megatron_oreal.config import AnswerRule
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.engines.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from megatron_oreal.parallel.collectives import is_alone
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.answer import ANSWER_REGIONS
from megatron_oreal.rollout.group_broadcast import in_thread, share
from megatron_oreal.rollout.group_codec import PlacedGroup
from megatron_oreal.rollout.pending_groups import Asked, Harvest
from megatron_oreal.types import Group, Int32Array, Sample, Verdict, no_ids

MAX_FRUITLESS_CALLS = 20  # to an engine that gives responses up by itself, without a token more


@dataclass(slots=True)
class Sampler:
    """Gives every rank the same groups; the first rank verifies and knows the texts."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    verifier: MathVerifier | None  # None on the other ranks
    require_stop: bool  # a response without a stop is wrong
    stop_strings: tuple[str, ...] = ()  # end a response too, and stay in it
    answer_rule: AnswerRule = "last_box"

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, params: SamplingParams, seed: str
    ) -> list[Group]:
        """`num_samples` a prompt; a sample's seed depends on `seed`, the prompt's place and its own number. Collective.

        With servers, the first rank asks them and hands the groups to the others.
        """
        asked = [Asked(prompt, f"{seed}/{place}") for place, prompt in enumerate(prompts)]
        if self.engine.is_collective:
            return self._sample_together(asked, num_samples, params)
        future = None if self.verifier is None else in_thread(partial(self.produce, asked, num_samples, params))
        return [placed.group for placed in share(future, prompts)]

    def produce(self, asked: Sequence[Asked], num_samples: int, params: SamplingParams) -> list[PlacedGroup]:
        """Every group, in order. The first rank alone, in any thread."""
        harvest = Harvest(asked, num_samples, self.judge)
        try:
            requests = [request for one in asked for request in one.requests(num_samples)]
            self.gather(harvest, dict(enumerate(requests)), params)
            groups = harvest.groups()
        finally:
            harvest.close()
        return [PlacedGroup(number, groups[number]) for number in range(len(asked))]

    def gather(
        self, harvest: Harvest, requests: Mapping[int, GenerationRequest], params: SamplingParams
    ) -> dict[int, GenerationRequest]:
        """Generates until every request is answered or the harvest is over; returns those left, with what was begun.

        A response that a change of weights has cut is continued. Raises RuntimeError when nothing comes any more.
        """
        left = dict(requests)
        num_fruitless = 0
        while left and not harvest.is_over:
            numbers, version = list(left), self.engine.version
            watch = Renumbered(harvest, [(number, left[number].begun) for number in numbers], version)
            num_tokens = sum(map(num_begun_tokens, left.values()))
            for place, generation in enumerate(self.engine.generate(list(left.values()), params, watch)):
                watch(place, generation)  # for an engine that tells late
                left[numbers[place]] = continuation(left[numbers[place]], watch.dated(place, generation))
            left = {number: request for number, request in left.items() if number not in harvest.finished}
            has_grown = len(left) < len(numbers) or sum(map(num_begun_tokens, left.values())) > num_tokens
            num_fruitless = 0 if has_grown else num_fruitless + 1
            if num_fruitless == MAX_FRUITLESS_CALLS:
                raise RuntimeError(f"the engine gave up {len(left)} responses {num_fruitless} times without a token")
        return left

    def judge(self, asked: Asked, generations: Sequence[Generation]) -> Group:
        """The first rank alone, in any thread."""
        samples = [self._sample(asked.prompt, generation) for generation in generations]
        prompt = asked.prompt.prompt
        for sample, verdict in zip(samples, self._verify([(s, prompt.answer) for s in samples]), strict=True):
            sample.verdict = verdict
        return Group(prompt, samples)

    def _sample_together(self, asked: Sequence[Asked], num_samples: int, params: SamplingParams) -> list[Group]:
        requests = [request for one in asked for request in one.requests(num_samples)]
        generations = iter(self.engine.generate(requests, params))
        groups = [
            Group(one.prompt.prompt, [self._sample(one.prompt, next(generations)) for _ in range(num_samples)])
            for one in asked
        ]
        samples = [(sample, group.prompt.answer) for group in groups for sample in group.samples]
        for (sample, _), verdict in zip(samples, self._verdicts(samples), strict=True):
            sample.verdict = verdict
        return groups

    def _sample(self, prompt: EncodedPrompt, generation: Generation) -> Sample:
        num_tokens = tokens_to_stop_string(generation.response_ids, self.stop_strings, self.tokenizer)
        stopped_by_token = num_tokens is None and generation.finish_reason == "stop"
        response_ids = generation.response_ids[:num_tokens]
        shown_ids = response_ids[:-1] if stopped_by_token else response_ids
        versions = generation.policy_versions[:num_tokens]
        oldest = int(versions.min()) if len(versions) else self.engine.version
        return Sample(
            prompt_id=prompt.prompt.id,
            prompt_ids=prompt.token_ids,
            response_ids=response_ids,
            response_text=self.tokenizer.decode(shown_ids) if self.verifier else "",
            rollout_logprobs=generation.rollout_logprobs[:num_tokens],
            model_logprobs=generation.model_logprobs[:num_tokens],
            finish_reason=generation.finish_reason if num_tokens is None else "stop",
            policy_version=oldest,
            policy_versions=versions if (versions > oldest).any() else no_ids(),
        )

    def _verdicts(self, samples: Sequence[tuple[Sample, str]]) -> list[Verdict]:
        verdicts: list[Verdict] = []
        if self.verifier is not None:
            verdicts = self._verify(samples)
        if is_alone():
            return verdicts
        shared = [verdicts]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def _verify(self, samples: Sequence[tuple[Sample, str]]) -> list[Verdict]:
        """A response that was cut is not sent to the verifier when it needs its stop token."""
        assert self.verifier is not None
        is_cut = [self.require_stop and sample.finish_reason != "stop" for sample, _ in samples]
        region = ANSWER_REGIONS[self.answer_rule]
        pairs = [
            (region(sample.response_text), answer)
            for (sample, answer), cut in zip(samples, is_cut, strict=True)
            if not cut
        ]
        judged = iter(self.verifier.verify_many(pairs))
        return [Verdict(0.0, "too_long", None) if cut else next(judged) for cut in is_cut]


@dataclass(slots=True)
class Renumbered:
    """A watch on some of a harvest's requests, in the order in which the engine was given them."""

    harvest: Harvest
    requests: Sequence[tuple[int, Generation | None]]  # the harvest's number, what was begun
    version: int  # when the engine was called: of tokens for which it names none

    def __call__(self, index: int, generation: Generation) -> bool:
        return self.harvest(self.requests[index][0], self.dated(index, generation))

    def dated(self, index: int, generation: Generation) -> Generation:
        """With a policy version for each token."""
        if len(generation.policy_versions):
            return generation
        begun = self.requests[index][1]
        before = no_ids() if begun is None else begun.policy_versions
        added = np.full(len(generation.response_ids) - len(before), self.version, dtype=np.int32)
        return replace(generation, policy_versions=np.concatenate([before, added]))


def continuation(request: GenerationRequest, generation: Generation) -> GenerationRequest:
    return replace(request, begun=generation) if len(generation.response_ids) else request


def num_begun_tokens(request: GenerationRequest) -> int:
    return len(request.begun.response_ids) if request.begun is not None else 0


def tokens_to_stop_string(response_ids: Int32Array, stop_strings: Sequence[str], tokenizer: Tokenizer) -> int | None:
    """The fewest tokens whose text holds a stop string; None when there is none. What follows was never asked for."""

    def holds_stop(count: int) -> bool:
        text = tokenizer.decode(response_ids[:count])
        return any(stop in text for stop in stop_strings)

    if not stop_strings or not holds_stop(len(response_ids)):
        return None
    # A longer text holds what a shorter one holds.
    return bisect.bisect_left(range(len(response_ids)), True, key=holds_stop)
