"""Defines the settings of generation and of the generation servers. Imports no torch."""

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
    """The settings of the distribution from which the engine draws each token."""

    # The engine samples from softmax(logits / temperature), and the losses train that distribution; 0 is greedy
    # decoding.
    temperature: float = Field(default=1.0, ge=0)
    # Nucleus sampling: the engine draws only from the likeliest tokens whose probabilities together reach top_p.
    # rollout.loss_support says whether the losses use the same tokens.
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # The engine draws only from the top_k likeliest tokens; 0 draws from all.
    max_new_tokens: PositiveInt = 1024  # The length limit of a response; the engine cuts a response that reaches it.
    max_total_tokens: PositiveInt | None = None  # The limit of prompt and response together; null sets no limit.

    @property
    def is_truncated(self) -> bool:
        """Says whether top_p or top_k excludes some tokens from sampling."""
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


class SglangConfig(Section):
    """The settings of SGLang servers, which the run starts, or which `endpoints_file` names."""

    # The Python interpreter of the servers; tools/setup_sglang.sh makes it.
    python: Path = Path(".venv-sglang/bin/python")
    # The number of servers that the run starts; with colocated, it is the number on each node.
    num_servers: PositiveInt = 1
    tensor: PositiveInt = 1  # The number of GPUs that one server uses.
    # disaggregated gives the servers GPUs of their own; colocated lets servers and trainer take turns on the trainer's
    # GPUs.
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    # The GPUs of this node that the servers use, in order. An empty list takes the GPUs after the trainer's; with
    # colocated it takes the trainer's own.
    gpus: list[int] = []
    # The address of the interface that servers listen on. With colocated on several nodes, keep the default.
    host: str = "127.0.0.1"
    ports: tuple[int, int] = (31000, 31999)  # The first and the last port that servers may use.
    # More options of SGLang's server, for example {mem-fraction-static: 0.8}; true passes an option without a value.
    flags: dict[str, bool | int | float | str] = {}
    # true makes the servers use https with their own certificate; auto does so if host is not a loopback address.
    tls: bool | Literal["auto"] = "auto"
    # The environment variables that servers receive although their names look like secrets, for example [HF_TOKEN].
    secrets: list[str] = []
    # The file that `megatron-oreal serve` wrote; the run uses those servers and starts none.
    endpoints_file: Path | None = None
    router: bool = False  # The run puts sglang-router between the trainer and its servers.
    start_timeout_seconds: PositiveFloat = 900  # The time limit for the start of a server.
    request_timeout_seconds: PositiveFloat = 3600  # The time limit for one response.
    # The largest number of requests that one server handles at the same time.
    max_concurrent_requests: PositiveInt = 256
    max_failures: PositiveInt = 3  # The run treats a server as dead after this many consecutive failures.
    max_restarts: int = Field(default=3, ge=0)  # The total number of server restarts that the run may make.
    # The time that a run without a living server waits for one to restart, before the run ends.
    outage_seconds: float = Field(default=1800, ge=0)
    # How the trainer sends weights to the servers: through files, over a process group, or (colocated only) as shared
    # GPU memory.
    weight_transport: Literal["disk", "distributed", "tensor"] = "distributed"
    weight_senders: PositiveInt = 1  # The number of trainer ranks that send weights; each serves a part of the servers.
    weight_timeout_seconds: PositiveFloat = 600  # The time limit for one weight synchronisation.
    bucket_bytes: PositiveInt = 512 * 2**20  # The trainer sends weights in buckets of about this many bytes.
    check_weights: bool = False  # The run compares the servers' checksums after each weight synchronisation.

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
    """The settings of generation: the engine, and the number and length of the responses."""

    # Where responses are generated: in the trainer's own processes (local) or on servers (sglang).
    engine: Literal["local", "sglang"] = "local"
    sglang: SglangConfig = SglangConfig()  # The settings of the servers for engine=sglang.
    group_size: int = Field(default=16, ge=1)  # The number of samples of each prompt.
    # The largest number of times that the run samples one prompt, until pure_rejection_sampling has num_correct correct
    # samples.
    draw_rounds: PositiveInt = 1
    # The largest number of prompt batches that a step samples, until prompts_per_step groups are mixed (DAPO).
    prompt_rounds: PositiveInt = 1
    # Token ids that end a response, besides the end tokens of tokenizer, config.json and generation_config.json.
    stop_tokens: list[str] = []
    stop_strings: list[str] = []  # Texts that also end a response; the response keeps the text.
    batch_size: PositiveInt = 512  # The number of sequences that one process of the local engine decodes together.
    # The largest age of a sample, in steps, when the policy trains on it; more than 0 needs servers.
    staleness: int = Field(default=0, ge=0)
    # The run requests this many prompts for each prompt that it needs, and abandons the slowest ones.
    oversampling: float = Field(default=1.0, ge=1)
    # What happens to abandoned responses. The run drops them, which favours short responses, or a later step resumes
    # them; auto resumes them where servers generate and the losses use all tokens.
    unfinished: Literal["auto", "drop", "resume"] = "auto"
    # The losses use the policy's log-probs over all tokens, or over the tokens that top_p and top_k keep.
    loss_support: Literal["all", "sampled"] = "all"
    # The run writes every response to disk at once, so that a restart generates only the missing ones.
    ledger: bool = True
    record: bool = False  # The run keeps every response in RUN_DIR/recording, for a replay.
    # The run directory whose recorded responses replace generation; null: the engine generates.
    replay: Path | None = None
    # The run trains nothing and writes no checkpoint; each step generates and judges with the initial weights.
    only: bool = False
    # The run ends when the mean difference of log-probs reaches this value, because the engine then has another model;
    # null never ends the run.
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
        """Says whether a later step resumes the responses that the run abandoned."""
        if self.unfinished == "auto":
            return self.oversampling > 1 and self.engine == "sglang" and not self.trains_truncated
        return self.unfinished == "resume"

    @property
    def trains_truncated(self) -> bool:
        """Says whether the losses use only the tokens that top_p and top_k keep."""
        return self.is_truncated and self.loss_support == "sampled"

    @property
    def engine_logprobs(self) -> EngineLogprobs:
        """Says which of the engine's log-probs belong to the trained distribution.

        If the losses use only the kept tokens, these are the log-probs of the sampled distribution, which the local
        engine reports. Otherwise they are the log-probs without truncation: at temperature 1 those of the model itself,
        and at another temperature those of the sampled distribution, if nothing was truncated. SGLang's answers report
        neither of these two.
        """
        if self.trains_truncated:
            return "rollout" if self.engine == "local" else "unknown"
        if self.temperature in (0, 1):  # A temperature of 0 trains nothing.
            return "model"
        return "rollout" if self.engine == "local" and not self.is_truncated else "unknown"

    def longest_response(self, num_prompt_tokens: int) -> int:
        """Returns the largest number of tokens that the response to a prompt may have; 0 or less if no token fits."""
        return longest_response(self.max_new_tokens, self.max_total_tokens, num_prompt_tokens)

    def longest_sequence(self, max_prompt_tokens: int) -> int:
        """Returns the largest number of tokens that a prompt and its response may have together."""
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
        # The local engine generates while the trainer waits, and finishes every response that it begins.
        needs_servers = {"staleness": self.staleness > 0, "unfinished": self.unfinished == "resume"}
        for name in (name for name, is_set in needs_servers.items() if is_set and self.engine == "local"):
            raise ValueError(f"rollout.{name} needs servers: set rollout.engine=sglang, or drop it")
        if self.staleness > 0 and self.sglang.placement == "colocated":
            raise ValueError("rollout.staleness > 0 needs rollout.sglang.placement=disaggregated: both work at once")
        return self


def longest_response(max_new_tokens: int, max_total_tokens: int | None, num_prompt_tokens: int) -> int:
    """Returns how many tokens the two limits leave for the response to a prompt of this length."""
    return max_new_tokens if max_total_tokens is None else min(max_new_tokens, max_total_tokens - num_prompt_tokens)
