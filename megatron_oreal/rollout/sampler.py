"""Turns prompts into groups of judged samples: requests, generation, verification, and the record on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.engines.engine import (
    ALONE,
    BatchIndex,
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingParams,
)
from megatron_oreal.engines.stop_strings import tokens_to_stop_string
from megatron_oreal.rewards.verifier import Verifier
from megatron_oreal.rollout.group_broadcast import in_thread, share
from megatron_oreal.rollout.group_codec import NumberedGroup
from megatron_oreal.rollout.pending_groups import PendingGroups, PromptRequest
from megatron_oreal.types import Group, Prompt, Sample, Verdict, no_ids

MAX_FRUITLESS_CALLS = 20  # consecutive calls in which the engine aborted every response without a new token


@dataclass(slots=True)
class Sampler:
    """Samples groups from prompts. The first rank asks the engine and verifies; all ranks get the groups."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    verifier: Verifier  # only the first rank uses it
    is_main: bool  # whether this is the first rank
    require_stop: bool  # whether a response without a stop is wrong
    stop_strings: tuple[str, ...] = ()  # the response ends with them and keeps them

    def sample(
        self, prompts: Sequence[EncodedPrompt], num_samples: int, params: SamplingParams, seed: str
    ) -> list[Group]:
        """Returns `num_samples` samples of each prompt, on all ranks. Collective; only main threads may call it.

        A sample's seed depends on `seed`, the prompt's index and the sample's own number. The other ranks receive no
        texts.
        """
        future: Future[list[NumberedGroup]] = Future()
        if self.is_main:
            requests = [PromptRequest(prompt, f"{seed}/{index}") for index, prompt in enumerate(prompts)]
            future = in_thread(partial(self.produce, requests, num_samples, params))
        return [numbered.group for numbered in share(future, self.engine, prompts, self.is_main)]

    def produce(
        self, prompt_requests: Sequence[PromptRequest], num_samples: int, params: SamplingParams
    ) -> list[NumberedGroup]:
        """Returns every group, in the order of the requests. Only the first rank calls this, from any thread."""
        pending = PendingGroups(prompt_requests, num_samples, self.judge, num_judging=self.verifier.num_concurrent)
        try:
            requests = [request for one in prompt_requests for request in one.requests(num_samples)]
            self.gather(pending, dict(enumerate(requests)), params)
            groups = pending.groups()
        finally:
            pending.close()
        return [NumberedGroup(number, groups[number]) for number in range(len(prompt_requests))]

    def gather(
        self, pending: PendingGroups, requests: Mapping[int, GenerationRequest], params: SamplingParams
    ) -> dict[int, GenerationRequest]:
        """Generates until every request is answered or enough groups are complete; returns the remaining requests.

        A remaining request holds its partial response. A response that new weights have interrupted is continued.
        Raises RuntimeError if the engine repeatedly aborts responses without a new token. Only the first rank calls
        this, from any thread.
        """
        left = dict(requests)
        num_fruitless = 0
        while left and not pending.is_over:
            numbers, version = list(left), self.engine.version
            watch = RequestIndexMap(pending, [(number, left[number].begun) for number in numbers], version)
            num_tokens = sum(map(num_begun_tokens, left.values()))
            for index, generation in enumerate(self.engine.generate(list(left.values()), params, watch)):
                number = numbers[index]
                if number not in pending.finished:  # it was aborted, or the engine has not passed it
                    watch(index, generation)
                    left[number] = continuation(left[number], watch.dated(index, generation))
            left = {number: request for number, request in left.items() if number not in pending.finished}
            has_grown = len(left) < len(numbers) or sum(map(num_begun_tokens, left.values())) > num_tokens
            num_fruitless = 0 if has_grown else num_fruitless + 1
            if num_fruitless == MAX_FRUITLESS_CALLS:
                raise RuntimeError(f"the engine gave up {len(left)} responses {num_fruitless} times without a token")
        return left

    def judge(self, request: PromptRequest, generations: Sequence[Generation]) -> Group:
        """Verifies the responses to one prompt. Only the first rank calls this, from any thread."""
        prompt = request.prompt.prompt
        samples = [self._sample(request.prompt, generation) for generation in generations]
        for sample, verdict in zip(samples, self._verify(samples, prompt), strict=True):
            sample.verdict = verdict
        return Group(prompt, samples)

    def _sample(self, prompt: EncodedPrompt, generation: Generation) -> Sample:
        num_tokens = tokens_to_stop_string(generation.response_ids, self.stop_strings, self.tokenizer.decode)
        stopped_by_token = num_tokens is None and generation.finish_reason == "stop"
        response_ids = generation.response_ids[:num_tokens]
        shown_ids = response_ids[:-1] if stopped_by_token else response_ids
        versions = generation.policy_versions[:num_tokens]
        oldest = int(versions.min()) if len(versions) else self.engine.version
        return Sample(
            prompt_id=prompt.prompt.id,
            prompt_ids=prompt.token_ids,
            response_ids=response_ids,
            response_text=self.tokenizer.decode(shown_ids),
            rollout_logprobs=generation.rollout_logprobs[:num_tokens],
            model_logprobs=generation.model_logprobs[:num_tokens],
            finish_reason=generation.finish_reason if num_tokens is None else "stop",
            policy_version=oldest,
            policy_versions=versions if (versions > oldest).any() else no_ids(),
        )

    def _verify(self, samples: Sequence[Sample], prompt: Prompt) -> list[Verdict]:
        """Verifies samples. With `require_stop`, a response that was cut is wrong without a call of the verifier."""
        is_cut = [self.require_stop and sample.finish_reason != "stop" for sample in samples]
        whole = [sample.response_text for sample, cut in zip(samples, is_cut, strict=True) if not cut]
        judged = iter(self.verifier.verify_responses(prompt, whole) if whole else [])
        return [Verdict(0.0, "too_long", None) if cut else next(judged) for cut in is_cut]


@dataclass(slots=True)
class RequestIndexMap:
    """A `Watch` that maps the engine's index of a request to the request's number among the pending groups.

    Example: of requests 0 to 3 only 1 and 3 remain, so the engine gets [request 1, request 3]. Its index 1 then means
    request 3.
    """

    pending: PendingGroups
    requests: Sequence[tuple[int, Generation | None]]  # by the engine's index: its number, its earlier partial response
    version: int  # of the weights when the engine was called, for tokens without a version from the engine

    def __call__(self, index: int, generation: Generation, batch: BatchIndex = ALONE) -> bool:
        return self.pending(self.requests[index][0], self.dated(index, generation), batch)

    def dated(self, index: int, generation: Generation) -> Generation:
        """Returns the generation with a policy version for each token."""
        return with_versions(generation, self.requests[index][1], self.version)


def with_versions(generation: Generation, begun: Generation | None, version: int) -> Generation:
    """Returns the generation with a policy version for each token: `version` for new tokens without one.

    begun: the response that the engine continued.
    """
    if len(generation.policy_versions):
        return generation
    num_begun = 0 if begun is None else len(begun.policy_versions)
    versions = np.full(len(generation.response_ids) - num_begun, version, dtype=np.int32)
    if begun is not None:
        versions = np.concatenate([begun.policy_versions, versions])
    return replace(generation, policy_versions=versions)


def continuation(request: GenerationRequest, generation: Generation) -> GenerationRequest:
    """Returns a request that continues `generation`."""
    return replace(request, begun=generation) if len(generation.response_ids) else request


def num_begun_tokens(request: GenerationRequest) -> int:
    return len(request.begun.response_ids) if request.begun is not None else 0
