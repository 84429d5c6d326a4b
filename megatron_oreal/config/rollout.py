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
    """How a response is drawn, token by token."""

    # Samples are drawn from softmax(logits / temperature), and that distribution is trained; 0 is greedy.
    temperature: float = Field(default=1.0, ge=0)
    # Only the likeliest tokens that together have this probability are drawn. rollout.loss_support says whether losses
    # are within them.
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # Only so many of the likeliest tokens are drawn; 0 draws from all.
    max_new_tokens: PositiveInt = 1024  # The length limit of a response; one that reaches it is cut.
    max_total_tokens: PositiveInt | None = None  # The limit of prompt and response together; null: there is none.

    @property
    def is_truncated(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


class SglangConfig(Section):
    """SGLang servers: started by the run, or named in `endpoints_file`."""

    python: Path = Path(".venv-sglang/bin/python")  # The servers' interpreter; tools/setup_sglang.sh makes it.
    num_servers: PositiveInt = 1  # The number of servers that the run starts; with colocated, on each node.
    tensor: PositiveInt = 1  # The GPUs that one server uses.
    # disaggregated puts servers on GPUs of their own; colocated puts them on the trainer's, where each gives way to the
    # other.
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    # The GPUs of this node that servers take, in order; an empty list takes those after the trainer's, or with
    # colocated the trainer's own.
    gpus: list[int] = []
    # The address of the interface that servers listen on. With colocated on several nodes, leave it as it is.
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (31000, 31999)  # The first and the last port that servers may take.
    # More options of SGLang's server, for example {mem-fraction-static: 0.8}; true gives an option without a value.
    flags: dict[str, bool | int | float | str] = {}
    # Servers speak https with a certificate of their own; auto does so where host is no loopback address.
    tls: bool | Literal["auto"] = "auto"
    # The environment variables that servers get although they look like secrets, for example [HF_TOKEN].
    secrets: list[str] = []
    # The file that `megatron-oreal serve` wrote: the run uses those servers and starts none.
    endpoints_file: Path | None = None
    router: bool = False  # The run puts sglang-router between the trainer and its servers.
    start_timeout_seconds: PositiveFloat = 900  # How long a server may take to start.
    request_timeout_seconds: PositiveFloat = 3600  # How long one response may take.
    max_concurrent_requests: PositiveInt = 256  # The requests that a server gets at the same time.
    max_failures: PositiveInt = 3  # A server with so many failures one after the other counts as dead.
    max_restarts: int = Field(default=3, ge=0)  # How often the run restarts a server, all servers together.
    # How long a run waits for a server to be started again when none is left; then it ends.
    outage_seconds: float = Field(default=1800, ge=0)
    # How weights reach the servers: through files, over a process group, or (colocated only) as shared GPU memory.
    weight_transport: Literal["disk", "distributed", "tensor"] = "distributed"
    weight_senders: PositiveInt = 1  # So many trainer ranks share the servers out to send them weights.
    weight_timeout_seconds: PositiveFloat = 600  # How long one synchronisation of weights may take.
    bucket_bytes: PositiveInt = 512 * 2**20  # The bytes of weights that travel together.
    check_weights: bool = False  # The servers' checksums are compared after each synchronisation.

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
    """How responses are generated: by which engine, how many, and how long."""

    engine: Literal["local", "sglang"] = "local"  # The trainer's own processes generate, or servers beside them.
    sglang: SglangConfig = SglangConfig()  # The servers of engine=sglang.
    group_size: int = Field(default=16, ge=1)  # The number of samples of each prompt.
    # How often a prompt is sampled at most, until pure_rejection_sampling has its num_correct correct samples.
    draw_rounds: PositiveInt = 1
    # How many batches of prompts a step samples at most, until prompts_per_step groups are mixed (DAPO).
    prompt_rounds: PositiveInt = 1
    # Tokens that end a response, besides the end tokens of tokenizer, config.json and generation_config.json.
    stop_tokens: list[str] = []
    stop_strings: list[str] = []  # Texts that end a response too, and stay in it.
    batch_size: PositiveInt = 512  # The sequences that a process of the local engine decodes together.
    # How many steps a sample may be older than the policy that it trains; more than 0 needs servers.
    staleness: int = Field(default=0, ge=0)
    # So many prompts are asked for each one that is needed; the slowest are given up.
    oversampling: float = Field(default=1.0, ge=1)
    # What happens to the responses that were given up: they are dropped, which prefers short ones, or a later step
    # resumes them; auto resumes them where servers generate and the losses are among all tokens.
    unfinished: Literal["auto", "drop", "resume"] = "auto"
    # The policy's log-probs in the losses are those among all tokens, or among the tokens that top_p and top_k keep.
    loss_support: Literal["all", "sampled"] = "all"
    # Every response is kept on disk at once, so that after a kill only the missing ones are generated.
    ledger: bool = True
    record: bool = False  # Every response stays in RUN_DIR/recording, for a replay.
    # The run directory whose recorded responses are taken instead of generating any; null: the engine generates.
    replay: Path | None = None
    # Nothing is trained: each step generates and judges with the weights of the start, and no checkpoint is written.
    only: bool = False
    # The mean difference from which the run ends, because the engine has another model; null never ends it.
    mismatch_limit: float | None = Field(default=1.0, gt=0)

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
    def resumes(self) -> bool:
        """Whether a later step resumes the responses that were given up."""
        if self.unfinished == "auto":
            return self.oversampling > 1 and self.engine == "sglang" and not self.trains_truncated
        return self.unfinished == "resume"

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
        if self.record and self.replay is not None:
            raise ValueError("rollout.record: a replay has nothing new to record; drop it, or rollout.replay")
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
