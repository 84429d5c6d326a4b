"""The interface of a rollout engine, and the data that crosses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pydantic import ValidationError
from torch import Tensor

from megatron_oreal.config.loading import describe
from megatron_oreal.config.rollout import SamplingConfig, longest_response
from megatron_oreal.engines.main_thread import MainThreadCalls
from megatron_oreal.types import FinishReason, Float32Array, Int32Array, TokenData, no_ids


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """The distribution sampled from, and where a response ends.

    The order is temperature, top_k, top_p: `top_p` counts the mass of what `top_k` left.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: all
    top_k: int = 0  # 0: all
    max_new_tokens: int = 1024
    max_total_tokens: int | None = None  # of prompt and response together
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()  # they stay in the response, like stop tokens

    def __post_init__(self) -> None:
        """Raises ValueError where the configuration of the same settings would."""
        settings = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        try:
            SamplingConfig(**settings)
        except ValidationError as error:
            raise ValueError(f"rollout.{describe(error)}") from None

    def longest_response(self, num_prompt_tokens: int) -> int:
        """Returns how many tokens the response to a prompt may have; 0 or less where there is no room for one."""
        return longest_response(self.max_new_tokens, self.max_total_tokens, num_prompt_tokens)

    def longest_sequence(self, num_prompt_tokens: int) -> int:
        """Returns how many tokens a prompt of this length and its response may have together."""
        return num_prompt_tokens + self.longest_response(num_prompt_tokens)


@dataclass(slots=True, frozen=True, eq=False)
class Generation(TokenData):
    """What an engine returns for one request.

    Example: `Generation([15, 7, 1], [-0.5, -0.1, 0.0], [-0.5, -0.1, 0.0], "stop", [3, 3, 4])` ended with the stop
    token 1, which weights of version 4 generated.
    """

    response_ids: Int32Array  # [R], the stop token included when one was produced
    # [R], log-probs of the distribution that was sampled from: tempered, truncated; 0 when greedy. Empty where the
    # engine cannot tell.
    rollout_logprobs: Float32Array
    model_logprobs: Float32Array  # [R], log-probs of the untempered, untruncated model
    finish_reason: FinishReason  # abort: given up, or cut by a change of weights; the tokens so far may be continued
    policy_versions: Int32Array = field(default_factory=no_ids)  # [R], of the weights that generated each token


@dataclass(slots=True, frozen=True, eq=False)
class GenerationRequest(TokenData):
    prompt_ids: Int32Array  # [P]
    seed: int  # of this response alone; the samples of a group need different ones
    begun: Generation | None = None  # an aborted response to continue; the answer holds its tokens too


class BatchIndex(NamedTuple):
    """Which response of a batch this is. Example: BatchIndex(2, 8), the third of eight that were decoded together."""

    position: int
    size: int


ALONE = BatchIndex(0, 1)


class Watch(Protocol):
    def __call__(self, index: int, generation: Generation, batch: BatchIndex = ALONE) -> bool:
        """The engine calls this with the response to request `index` as soon as the response ends.

        Responses whose last digits depend on each other have a common `batch`; the engine tells of them one after the
        other. The watch returns True when the rest may be given up.
        """


class RolloutEngine(Protocol):
    """Generates responses. The first rank asks it; an engine that needs the other ranks calls them to take part."""

    version: int  # of the weights, as the last `update_weights` named it; 0 before
    calls: MainThreadCalls  # what `generate` needs of all ranks; servers need nothing, and leave it empty

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """Returns one response for each request, in the requests' order; those given up have finish_reason "abort".

        The first rank alone calls this, from any thread.
        """

    def take_part(self) -> None:
        """Does this rank's part of the oldest call in the first rank's `calls`.

        Collective: the main threads of all ranks call this together, when the first rank's `calls` is not empty.
        """

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights by (Hugging Face name, whole tensor) pairs. Collective: every rank reads the stream."""

    def flush_metrics(self) -> dict[str, float]:
        """Returns what happened since the last call, on the rank that knows."""

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""


def check_prompts(requests: Sequence[GenerationRequest], vocab_size: int, params: SamplingParams) -> None:
    """Raises ValueError for a prompt that is empty, leaves no room, or holds a token that the model does not know."""
    for index, request in enumerate(requests):
        if not len(request.prompt_ids):
            raise ValueError(f"request {index} has an empty prompt; give it at least one token")
        if request.prompt_ids.min() < 0 or request.prompt_ids.max() >= vocab_size:
            raise ValueError(
                f"request {index} has a token id outside the model's vocabulary of {vocab_size}: "
                "model.tokenizer and model.path do not fit"
            )
        if params.longest_response(len(request.prompt_ids)) < 1:
            raise ValueError(
                f"rollout.max_total_tokens={params.max_total_tokens}: the prompt of request {index} has "
                f"{len(request.prompt_ids)} tokens, which leaves no room for a response; raise it"
            )
