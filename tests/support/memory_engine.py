"""Provides a rollout engine without a model: prompt, seed, position and weights decide responses; a tick is a token."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_oreal.config import RolloutConfig
from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor
from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams, Watch
from megatron_oreal.engines.main_thread import MainThreadCalls
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.rollout.producer import GroupProducer
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import FinishReason, Message, Prompt
from tests.support.tiny_task import write_tokenizer

END, FIRST_DIGIT, BOX, CLOSE = 1, 2, 15, 16  # token ids
PARAMS = SamplingParams(max_new_tokens=32, stop_token_ids=(END,))


def draw(*key: object) -> int:
    return hashlib.blake2b(repr(key).encode(), digest_size=4).digest()[0]


class MemoryEngine:
    """Generates one filler digit a tick, up to `longest`, then a boxed digit: the prompt's first or another."""

    def __init__(self, longest: int = 20) -> None:
        self.calls = MainThreadCalls()
        self.version = 0
        self.weights = 0  # responses depend on this number
        self.longest = longest
        self.tick: Callable[[], None] = lambda: None  # called before each tick
        self.names_versions = True
        self.knows_rollout_logprobs = False  # True: it returns half of the model's log-probs
        self.is_closed = False
        self.asked: list[GenerationRequest] = []  # requests of all calls
        self.num_generated = 0  # tokens
        self.growing: list[Growing] = []  # responses of the newest call

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        self.asked += requests
        begun = [request.begun or Generation([], [], [], "abort") for request in requests]
        growing = [Growing(r, list(g.response_ids), list(g.model_logprobs), list(g.policy_versions))
                   for r, g in zip(requests, begun, strict=True)]  # fmt: skip
        self.growing = growing
        active, is_given_up = list(range(len(requests))), False
        while active and not is_given_up:
            self.tick()
            if self.is_closed:
                raise RuntimeError("the engine is closed")
            for index in list(active):
                growing[index].grow(self, params)
                self.num_generated += 1
                if growing[index].finish_reason != "abort":
                    active.remove(index)
                    if watch is not None and watch(index, growing[index].generation(self)):
                        is_given_up = True
                        break
        return [one.generation(self) for one in growing]

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        for _ in stream:
            pass
        self.weights = self.version = version

    def take_part(self) -> None: ...

    def flush_metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.is_closed = True

    @property
    def num_unfinished(self) -> int:
        """Returns the number of tokens in the newest call's unfinished responses."""
        return sum(len(one.ids) for one in self.growing if one.finish_reason == "abort")


@dataclass
class Growing:
    request: GenerationRequest
    ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish_reason: FinishReason = "abort"

    def grow(self, engine: MemoryEngine, params: SamplingParams) -> None:
        seed, place = self.request.seed, len(self.ids)
        length = 1 + draw(seed, "length") % engine.longest
        random = draw(seed, place, engine.weights)
        token = FIRST_DIGIT + random % 10
        if place >= length:
            digit = self.request.prompt_ids[0] if random % 2 else token
            token = [BOX, digit, CLOSE, END][place - length]
        self.ids.append(token)
        self.logprobs.append(-random / 64)
        self.versions.append(engine.version)
        if token in params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.ids) == params.max_new_tokens:
            self.finish_reason = "length"

    def generation(self, engine: MemoryEngine) -> Generation:
        versions = self.versions if engine.names_versions else []
        rollout = [logprob / 2 for logprob in self.logprobs] if engine.knows_rollout_logprobs else []
        return Generation(list(self.ids), rollout, list(self.logprobs), self.finish_reason, list(versions))


def make_prompts(count: int = 40) -> list[EncodedPrompt]:
    return [
        EncodedPrompt(
            Prompt(f"p{number}", (Message("user", f"{number % 10}+0="),), str(number % 10)),
            [FIRST_DIGIT + number % 10, 12, 13 + number % 2],
        )
        for number in range(count)
    ]


def make_tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer").exists():
        write_tokenizer(folder / "tokenizer")
    return load_tokenizer(folder / "tokenizer")


def make_producer(
    engine: MemoryEngine,
    tokenizer: Tokenizer,
    ledger: Ledger,
    cursor: PromptCursor[EncodedPrompt] | None = None,
    prompts_per_step: int = 3,
    is_main: bool = True,
    **settings: object,
) -> GroupProducer:
    sampler = Sampler(engine, tokenizer, MathVerifier(), is_main, require_stop=True)
    return GroupProducer(
        sampler=sampler,
        cursor=cursor or PromptCursor(make_prompts(), shuffle=True, seed=0),
        sampling=PARAMS,
        config=RolloutConfig(**{"engine": "sglang", "group_size": 4} | settings),  # type: ignore[arg-type]
        prompts_per_step=prompts_per_step,
        num_correct=0,
        needs_mixed=False,
        seed=0,
        ledger=ledger,
    )
