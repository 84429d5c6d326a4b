"""The settings of generation and of the servers that do it. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.correction import CorrectionSettings
from megatron_oreal.config.effects import Effects, condition
from megatron_oreal.config.section import Section

EngineLogprobs = Literal["model", "rollout", "unknown"]


class SamplingConfig(Section):
    # Samples are drawn from softmax(logits / temperature), and that distribution is trained; 0 is greedy.
    temperature: float = Field(default=1.0, ge=0)
    # Only the likeliest tokens of this mass, and only so many, are drawn (0: all). rollout.loss_support says whether
    # losses are within them.
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    max_new_tokens: PositiveInt = 1024
    max_total_tokens: PositiveInt | None = None  # The limit of prompt and response together; null: there is none.

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


class SglangConfig(Section):
    """SGLang servers: started by the run, or named in `endpoints_file`."""

    python: Path = Path(".venv-sglang/bin/python")  # The servers' interpreter (tools/setup_sglang.sh makes it)
    num_servers: PositiveInt = 1  # colocated: on each node
    tensor: PositiveInt = 1  # GPUs a server
    # disaggregated: on GPUs of their own; colocated: on the trainer's, where each gives way to the other
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    gpus: list[int] = []  # GPUs of this node in order; empty: those after the trainer's, or the trainer's own
    host: str = "127.0.0.1"  # address of the interface that servers listen on; colocated: leave it to several nodes
    ports: tuple[int, int] = (31000, 31999)  # first and last to choose from
    flags: dict[str, bool | int | float | str] = {}  # of SGLang, e.g. {mem-fraction-static: 0.8}; true: without a value
    tls: bool | Literal["auto"] = "auto"  # https with a certificate of its own; auto: where host is no loopback address
    secrets: list[str] = []  # environment variables that servers get although they look like secrets, e.g. [HF_TOKEN]
    endpoints_file: Path | None = None  # of `megatron-oreal serve`: servers that run elsewhere; none are started
    router: bool = False  # sglang-router between the trainer and its servers
    start_timeout_seconds: PositiveFloat = 900
    request_timeout_seconds: PositiveFloat = 3600  # of one response
    max_concurrent_requests: PositiveInt = 256  # a server
    max_failures: PositiveInt = 3  # one after the other, then a server counts as dead
    max_restarts: int = Field(default=3, ge=0)  # of all servers together, in one run
    weight_transport: Literal["disk", "distributed", "tensor"] = "distributed"
    weight_senders: PositiveInt = 1  # trainer ranks that share the servers out to send them weights
    weight_timeout_seconds: PositiveFloat = 600  # of one synchronisation
    bucket_bytes: PositiveInt = 512 * 2**20  # weights that travel together
    check_weights: bool = False  # compare the servers' checksums after each synchronisation

    @model_validator(mode="after")
    def check(self) -> Self:
        first, last = self.ports
        if not 1024 <= first <= last <= 65535:
            raise ValueError(f"rollout.sglang.ports must be two rising port numbers in [1024, 65535], got {self.ports}")
        if self.weight_transport == "tensor" and self.placement != "colocated":
            raise ValueError("rollout.sglang.weight_transport=tensor shares memory: it needs placement=colocated")
        if self.weight_transport == "tensor" and self.weight_senders > 1:
            raise ValueError(
                "rollout.sglang.weight_senders > 1 has no meaning for weight_transport=tensor, where all ranks send: "
                "drop it"
            )
        if self.tls is True and self.router:
            raise ValueError(
                "rollout.sglang.tls=true: sglang-router cannot check the servers' certificates; drop router, or set "
                "tls=false where you trust the network"
            )
        if self.placement == "colocated" and self.endpoints_file is not None:
            raise ValueError("rollout.sglang.placement=colocated starts its servers itself: drop endpoints_file")
        return self


class RolloutConfig(SamplingConfig, CorrectionSettings):
    engine: Literal["local", "sglang"] = "local"  # in the trainer's own processes, or servers beside it
    sglang: SglangConfig = SglangConfig()
    group_size: int = Field(default=16, ge=1)
    draw_rounds: PositiveInt = 1  # times that a prompt is sampled, until pure_rejection_sampling has its num_correct
    prompt_rounds: PositiveInt = 1  # batches of prompts a step, until prompts_per_step groups are mixed (DAPO)
    stop_tokens: list[str] = []  # besides the end tokens of tokenizer, config.json and generation_config.json
    stop_strings: list[str] = []  # end a response too, and stay in it
    batch_size: PositiveInt = 512  # sequences decoded together in a process of the local engine
    staleness: int = Field(default=0, ge=0)  # steps a sample may be older than the policy it trains; > 0 needs servers
    oversampling: float = Field(default=1.0, ge=1)  # prompts asked for each one needed; the slowest are given up
    unfinished: Literal["drop", "resume"] = "drop"  # responses that servers gave up
    # The policy's log-probs in the losses are those among all tokens, or among the tokens that top_p and top_k keep.
    loss_support: Literal["all", "sampled"] = "all"
    ledger: bool = True  # keep every response at once: after a kill, only the missing ones are generated
    mismatch_alarm: float | None = Field(default=None, gt=0)  # mean |dlogp| of engine and trainer that is warned of

    effects: ClassVar[Effects] = (
        (
            ("loss_support",),
            condition(
                lambda rollout: rollout.is_truncated,
                "where {at}top_p and {at}top_k keep all tokens: drop it, or give one of them",
            ),
        ),
    )

    @property
    def trains_truncated(self) -> bool:
        """Whether the losses are within the tokens that top_p and top_k keep."""
        return self.is_truncated and self.loss_support == "sampled"

    @property
    def engine_logprobs(self) -> EngineLogprobs:
        """Which of the engine's log-probs are of the trained distribution.

        Where the losses are within the kept tokens, they are those that were sampled from, which the local engine
        tells. Else they are those without truncation: at temperature 1 the model's own, and at another one those that
        were sampled from, if nothing was truncated. SGLang's answers tell neither.
        """
        if self.trains_truncated:
            return "rollout" if self.engine == "local" else "unknown"
        if self.temperature in (0, 1):  # Nothing is trained on greedy samples.
            return "model"
        return "rollout" if self.engine == "local" and not self.is_truncated else "unknown"

    def longest_response(self, num_prompt_tokens: int) -> int:
        """Returns how many tokens the response to a prompt may have; 0 or less where there is no room for one."""
        return longest_response(self.max_new_tokens, self.max_total_tokens, num_prompt_tokens)

    def longest_sequence(self, max_prompt_tokens: int) -> int:
        """Returns how many tokens a prompt and its response may have together."""
        longest = max_prompt_tokens + self.max_new_tokens
        return longest if self.max_total_tokens is None else min(longest, self.max_total_tokens)

    @model_validator(mode="after")
    def check(self) -> Self:
        if "" in self.stop_strings:
            raise ValueError("rollout.stop_strings: an empty string is in every text; drop it")
        if self.trains_truncated and (self.staleness > 0 or self.unfinished == "resume"):
            raise ValueError(
                "rollout.loss_support=sampled finds the kept tokens with the policy that sampled: drop it, or set "
                "rollout.staleness to 0 and rollout.unfinished to drop"
            )
        if self.trains_truncated and self.old_logprobs == "engine":
            raise ValueError(
                "rollout.loss_support=sampled needs the pass over the old policy, which finds the kept tokens: drop "
                "rollout.old_logprobs=engine"
            )
        if self.trains_truncated and self.engine == "sglang" and self.top_k > 0 and self.top_p < 1:
            raise ValueError(
                "rollout.loss_support=sampled: SGLang takes top_p of the mass of all tokens, not of the top_k: give "
                "only one of rollout.top_p and rollout.top_k"
            )
        # The local engine generates while the trainer waits, and begins no response that it does not finish.
        needs_servers = {"staleness": self.staleness > 0, "unfinished": self.unfinished == "resume"}
        for name in (name for name, is_set in needs_servers.items() if is_set and self.engine == "local"):
            raise ValueError(f"rollout.{name} needs servers: set rollout.engine=sglang, or drop it")
        if self.staleness > 0 and self.sglang.placement == "colocated":
            raise ValueError("rollout.staleness > 0 needs rollout.sglang.placement=disaggregated: both work at once")
        return self


def longest_response(max_new_tokens: int, max_total_tokens: int | None, num_prompt_tokens: int) -> int:
    """Returns how many tokens the two limits leave for the response to a prompt of this length."""
    return max_new_tokens if max_total_tokens is None else min(max_new_tokens, max_total_tokens - num_prompt_tokens)
