"""The interface of a rollout engine, and the data that crosses it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import ValidationError
from torch import Tensor

from megatron_oreal.config.loading import describe
from megatron_oreal.config.rollout import SamplingConfig
from megatron_oreal.types import FinishReason


@dataclass(slots=True, frozen=True)
class SamplingParams:
    """The distribution sampled from, and where a response ends.

    The order is temperature, top_k, top_p: `top_p` counts the mass of what `top_k` left.
    """

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: all
    top_k: int = 0  # 0: all
    max_new_tokens: int = 1024
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError where the configuration of the same settings would."""
        settings = {name: getattr(self, name) for name in SamplingConfig.model_fields}
        try:
            SamplingConfig(**settings)
        except ValidationError as error:
            raise ValueError(f"rollout.{describe(error)}") from None


@dataclass(slots=True, frozen=True)
class Generation:
    response_ids: list[int]  # the stop token included when one was produced
    # Of the distribution that was sampled from: tempered, truncated; 0 when greedy. Empty where the engine cannot tell.
    rollout_logprobs: list[float]
    model_logprobs: list[float]  # of the untempered, untruncated model
    finish_reason: FinishReason  # abort: given up, or cut by a change of weights; what is there may be continued
    policy_versions: list[int] = field(default_factory=list)  # of the weights that made each token


@dataclass(slots=True, frozen=True)
class GenerationRequest:
    prompt_ids: list[int]
    seed: int  # of this response alone; the samples of a group need different ones
    begun: Generation | None = None  # an aborted response to continue; the answer holds its tokens too


class Watch(Protocol):
    def __call__(self, index: int, generation: Generation) -> bool:
        """Told of request `index`'s response as soon as it ends; True: the rest may be given up."""


class RolloutEngine(Protocol):
    version: int  # of the weights, as the last `update_weights` named it; 0 before
    is_collective: bool  # every rank calls `generate` alike; else the first rank alone

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """One response a request, in the requests' order; those given up have finish_reason "abort"."""

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces all weights by (Hugging Face name, whole tensor) pairs; every rank consumes the stream."""

    def pause(self) -> None:
        """No generation until `resume`."""

    def resume(self) -> None: ...

    def flush_metrics(self) -> dict[str, float]:
        """What happened since the last call, on the rank that knows."""

    def health(self) -> bool:
        """Whether the engine can generate, now or after `resume`."""

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""


def check_prompts(requests: Sequence[GenerationRequest], vocab_size: int) -> None:
    for index, request in enumerate(requests):
        if not request.prompt_ids:
            raise ValueError(f"request {index} has an empty prompt; give it at least one token")
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= vocab_size:
            raise ValueError(
                f"request {index} has a token id outside the model's vocabulary of {vocab_size}: "
                "model.tokenizer and model.path do not fit"
            )
