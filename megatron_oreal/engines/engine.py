"""Defines the interface of a rollout engine and its data types."""

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
    """The distribution that responses are sampled from, and the conditions that end a response.

    The order is temperature, top_k, top_p: `top_p` applies to the probability mass that `top_k` keeps.
    """

    temperature: float = 1.0  # 0: greedy decoding
    top_p: float = 1.0  # 1: all tokens
    top_k: int = 0  # 0: all tokens
    max_new_tokens: int = 1024
    max_total_tokens: int | None = None  # of prompt and response together
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()  # the response keeps them, like stop tokens

    def __post_init__(self) -> None:
        """Raises ValueError for the values that the configuration of these settings refuses."""
        settings = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        try:
            SamplingConfig(**settings)
        except ValidationError as error:
            raise ValueError(f"rollout.{describe(error)}") from None

    def longest_response(self, num_prompt_tokens: int) -> int:
        """Returns the largest number of tokens that the response to a prompt may have; 0 or less if no token fits."""
        return longest_response(self.max_new_tokens, self.max_total_tokens, num_prompt_tokens)

    def longest_sequence(self, num_prompt_tokens: int) -> int:
        """Returns the largest total length of a prompt of this length and its response, in tokens."""
        return num_prompt_tokens + self.longest_response(num_prompt_tokens)


@dataclass(slots=True, frozen=True, eq=False)
class Generation(TokenData):
    """The response of an engine to one request.

    Example: `Generation([15, 7, 1], [-0.5, -0.1, 0.0], [-0.5, -0.1, 0.0], "stop", [3, 3, 4])` ended with the stop token
    1, which the weights of version 4 generated.
    """

    response_ids: Int32Array  # [R], including the stop token if there is one
    # [R], log-probs of the sampled distribution (with temperature and truncation); 0 for greedy decoding. Empty if the
    # engine does not know them.
    rollout_logprobs: Float32Array
    model_logprobs: Float32Array  # [R], log-probs of the model without temperature and truncation
    finish_reason: FinishReason  # abort: cut by the engine's caller or by new weights; it can be continued
    # [R], versions of the weights that generated each token
    policy_versions: Int32Array = field(default_factory=no_ids)


@dataclass(slots=True, frozen=True, eq=False)
class GenerationRequest(TokenData):
    prompt_ids: Int32Array  # [P]
    seed: int  # of this response; the samples of a group need different seeds
    begun: Generation | None = None  # an aborted response to continue; the answer repeats its tokens


class BatchIndex(NamedTuple):
    """The position of a response in its batch. BatchIndex(2, 8) is the third of eight responses decoded together."""

    position: int
    size: int


ALONE = BatchIndex(0, 1)


class Watch(Protocol):
    def __call__(self, index: int, generation: Generation, batch: BatchIndex = ALONE) -> bool:
        """Receives the response to request `index`. The engine calls this as soon as the response ends.

        Responses whose last digits depend on each other have a common `batch`, and the engine passes them one after the
        other. The watch returns True if the engine may abandon the remaining requests.
        """


class RolloutEngine(Protocol):
    """Generates responses for the first rank. If an engine needs the other ranks, it queues calls for them."""

    version: int  # of the weights, as the last `update_weights` named it; 0 before
    calls: MainThreadCalls  # the parts of `generate` that need all ranks; empty for servers, which need none

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """Returns one response for each request, in the requests' order; abandoned ones have finish_reason "abort".

        The first rank alone calls this, from any thread.
        """

    def take_part(self) -> None:
        """Does this rank's part of the oldest call in the first rank's `calls`.

        Collective: the main threads of all ranks call this together if the first rank's `calls` is not empty.
        """

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Collective. Replaces all weights by (Hugging Face name, whole tensor) pairs. Every rank reads the stream."""

    def flush_metrics(self) -> dict[str, float]:
        """Returns the metrics since the last call, on the rank that has them."""

    def close(self) -> None:
        """Frees the engine's resources. It cannot be used afterwards."""


def check_prompts(requests: Sequence[GenerationRequest], vocab_size: int, params: SamplingParams) -> None:
    """Raises ValueError for a prompt that is empty, too long, or has a token that the model does not know."""
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
