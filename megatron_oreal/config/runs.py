"""Defines the whole configuration of each command: `train` (TrainConfig), `sft` (SftConfig) and `eval` (EvalRunConfig).

When the configuration is built, it checks itself as far as it can without loading anything, and it checks that each
given setting has an effect.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.alarms import AlarmsConfig, MachineAlarms
from megatron_oreal.config.algorithms import ALGORITHM_SECTIONS, AnyAlgorithm, OrealConfig
from megatron_oreal.config.correction import CORRECTION_SETTINGS, Correction
from megatron_oreal.config.effects import Effects, choice, condition, never, positive
from megatron_oreal.config.evaluation import BenchmarkConfig
from megatron_oreal.config.models import ModelConfig, ParallelConfig, PolicyConfig
from megatron_oreal.config.monitoring import PrometheusConfig, TrackersConfig
from megatron_oreal.config.rollout import RolloutConfig
from megatron_oreal.config.section import Section
from megatron_oreal.config.verifier import HttpConfig, VerifierConfig
from megatron_oreal.config.watchdog import WatchdogConfig


class PromptConfig(Section):
    """The settings that turn a prompt into tokens; training and evaluation share them."""

    # How messages become text: by the tokenizer's chat template, by joining their contents (plain), or by `template`
    # around the last user message.
    format: Literal["chat", "plain", "template"] = "chat"
    template: str | None = None  # The text for format=template; {prompt} marks the place of the message.
    system_prompt: str | None = None  # The system prompt of prompts that have no system message.
    suffix: str = ""  # A text that is appended to the last user message, e.g. "Put the final answer in \\boxed{}."
    max_prompt_tokens: PositiveInt = 2048  # The run skips longer prompts, and logs their number.

    effects: ClassVar[Effects] = ((("system_prompt",), choice("format", "chat", "plain")),)

    @model_validator(mode="after")
    def check_template(self) -> Self:
        if (self.format == "template") != (self.template is not None):
            raise ValueError("data.template and data.format=template belong together: set both or none")
        if self.template is not None and self.template.count("{prompt}") != 1:
            raise ValueError("data.template must hold {prompt} exactly once")
        return self


class DataConfig(PromptConfig):
    """The settings of the prompts of a training run."""

    prompts: Path  # A file of JSON lines {"id", "prompt", "answer", "source", "pass_rate"}.
    prompts_per_step: PositiveInt = 64  # The number of groups (prompts) that a step trains on.
    # Each epoch has its own random order, which depends on the seed; false keeps the file's order.
    shuffle: bool = True
    # How often a prompt occurs in an epoch, by its pass rate: [[0.2, 6], [0.6, 4], [0.8, 2]] repeats pass rates below
    # 0.2 six times and leaves out pass rates of 0.8 and above.
    repeats_by_pass_rate: list[tuple[float, int]] = []

    @model_validator(mode="after")
    def check(self) -> Self:
        bounds = [bound for bound, _ in self.repeats_by_pass_rate]
        if bounds != sorted(bounds) or any(repeats < 0 for _, repeats in self.repeats_by_pass_rate):
            raise ValueError("data.repeats_by_pass_rate needs rising bounds and repeats >= 0")
        return self


class EvalConfig(Section):
    """The settings of the evaluation on held-out prompts during training."""

    prompts: dict[str, Path] = {}  # The name of each data set and its file of JSON lines; {} evaluates nothing.
    every: PositiveInt = 10  # The number of steps between two evaluations; the first one precedes the first step.
    # The number of responses to each prompt at rollout's temperature; 0 evaluates greedy responses only.
    num_samples: int = Field(default=1, ge=0)
    max_prompts: PositiveInt | None = None  # Only the first max_prompts prompts of each data set are used; null: all.
    num_examples: int = Field(default=3, ge=0)  # The number of greedy responses that each evaluation writes to a file.


class CheckpointConfig(Section):
    """The settings of checkpoints and of the exported model."""

    every: PositiveInt = 50  # The number of steps between two checkpoints.
    keep_last: PositiveInt = 2  # The number of newest checkpoints that the run keeps.
    # The number of further checkpoints, those with the highest best_metric, that the run keeps.
    keep_best: int = Field(default=1, ge=0)
    # The metric that ranks checkpoints, e.g. "eval/gsm8k/greedy"; empty keeps only the newest ones.
    best_metric: str = ""
    export_hf: bool = True  # At its end the run writes the final policy to RUN_DIR/hf.

    effects: ClassVar[Effects] = (
        (
            ("keep_best",),
            condition(
                lambda checkpoint: bool(checkpoint.best_metric) or checkpoint.keep_best == 0,
                "without {at}best_metric: drop it, or give {at}best_metric",
            ),
        ),
        (("best_metric",), positive("keep_best")),
    )


class LoggingConfig(Section):
    """The settings of records for `megatron-oreal view` besides metrics and samples."""

    # The run records this many groups of each step token by token, with log-probs and weights; 0 records none.
    rollout_tokens: int = Field(default=0, ge=0)


class ModelRunConfig(Section):
    """The settings of every command that runs a model."""

    run_dir: Path  # The folder for all output; the same command resumes the run in it.
    seed: int = 0  # The seed of all random numbers.
    # true makes updates reproducible, bit by bit. auto is true on a CPU, where it costs little, and false on CUDA.
    deterministic: bool | Literal["auto"] = "auto"
    model: ModelConfig  # The model and how it computes.
    parallel: ParallelConfig = ParallelConfig()  # How the processes share the model and the batch.

    @model_validator(mode="after")
    def check_effects(self) -> Self:
        self.refuse_idle_settings()
        return self


class RunConfig(ModelRunConfig):
    """The settings of every kind of training."""

    num_steps: PositiveInt  # The number of training steps of the run.
    checkpoint: CheckpointConfig = CheckpointConfig()  # What the run saves, and how often.
    watchdog: WatchdogConfig = WatchdogConfig()  # When the run counts as hanging.
    trackers: TrackersConfig = TrackersConfig()  # The experiment trackers that receive the run's records.
    prometheus: PrometheusConfig = PrometheusConfig()  # The endpoint that reports the trainer's state.


ON_POLICY_WORDS = (
    "while every sample comes from the policy that it trains: drop it, or raise rollout.staleness, or set "
    "rollout.unfinished to resume, or rollout.corrects to always"
)
CORRECTIONS = tuple(f"rollout.{name}" for name in CORRECTION_SETTINGS)
# The settings of rollouts that only `train` uses.
TRAINING_ROLLOUTS = tuple(
    f"rollout.{name}"
    for name in (
        "group_size",
        "draw_rounds",
        "prompt_rounds",
        "staleness",
        *CORRECTION_SETTINGS,
        "corrects",
        "oversampling",
        "unfinished",
        "loss_support",
        "ledger",
        "only",
        "mismatch_limit",
    )
)

GREEDY_WORDS = "for eval.num_samples=0, which is greedy: drop it, or raise eval.num_samples"
GREEDY_ONLY: Effects = (
    (("rollout.top_p", "rollout.top_k"), condition(lambda run: run.eval.num_samples > 0, GREEDY_WORDS)),
    (
        ("rollout.temperature",),  # another check reports a temperature of 0
        condition(lambda run: run.eval.num_samples > 0 or run.rollout.temperature == 0, GREEDY_WORDS),
    ),
)


class TrainConfig(RunConfig):
    """The configuration of `megatron-oreal train`: reinforcement learning on outcome rewards."""

    data: DataConfig  # The prompts.
    rollout: RolloutConfig = RolloutConfig()  # How responses are generated.
    verifier: VerifierConfig = VerifierConfig()  # How responses are rewarded.
    algorithm: Annotated[AnyAlgorithm, Field(discriminator="name")] = OrealConfig()  # How the policy learns.
    policy: PolicyConfig = PolicyConfig()  # The policy's optimizer.
    eval: EvalConfig = EvalConfig()  # The evaluation during training.
    logging: LoggingConfig = LoggingConfig()  # What is recorded besides metrics and samples.
    alarms: AlarmsConfig = AlarmsConfig()  # When the log warns.

    effects: ClassVar[Effects] = (
        (
            ("rollout.draw_rounds",),
            condition(
                lambda run: run.algorithm.sample_needs.num_correct > 0,
                "for an algorithm that takes prompts with any number of correct samples, as all but "
                "algorithm.objective=pure_rejection_sampling do: drop it",
            ),
        ),
        (CORRECTIONS, condition(lambda run: run.corrects_samples, ON_POLICY_WORDS)),
        (
            ("rollout.corrects", "rollout.old_logprobs"),
            condition(
                lambda run: run.rollout.engine_logprobs != "unknown",
                "where the engine's log-probs of the trained distribution are unknown: drop it, or set "
                "rollout.temperature to 1",
            ),
        ),
        (
            ("rollout.corrects", *CORRECTIONS),
            condition(
                lambda run: run.algorithm.takes_importance_weights,
                "for an algorithm that does not correct for the age of samples: drop it",
            ),
        ),
    )

    def effect_rows(self) -> Effects:
        """Returns this table's rows, and the algorithm's rows about other sections."""
        return super().effect_rows() + self.algorithm.run_effects

    @property
    def is_off_policy(self) -> bool:
        """Says whether samples may come from an older policy than the one that trains on them."""
        return self.rollout.staleness > 0 or self.rollout.resumes

    @property
    def corrects_samples(self) -> bool:
        """Says whether `rollout` requests a correction of samples from another distribution than the trained policy."""
        return self.is_off_policy or self.rollout.corrects == "always"

    @property
    def correction(self) -> Correction | None:
        """Returns how the losses correct for the sampled distribution; None means no correction."""
        is_asked_for = self.corrects_samples and self.algorithm.takes_importance_weights
        return self.rollout.as_correction() if is_asked_for else None

    @property
    def has_fresh_ratios(self) -> bool:
        """Says whether the ratios in a step's first update, to the trainer's policy before the step, are 1."""
        return self.correction is None or self.correction.old_logprobs == "trainer"

    @model_validator(mode="before")
    @classmethod
    def name_the_algorithm(cls, settings: Any) -> Any:
        """Sets the algorithm to OREAL if the file names none."""
        algorithm = settings.get("algorithm") or {} if isinstance(settings, dict) else None
        return settings | {"algorithm": {"name": "oreal"} | algorithm} if isinstance(algorithm, dict) else settings

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.rollout.group_size < self.algorithm.min_group_size:
            raise ValueError(
                f"rollout.group_size must be >= {self.algorithm.min_group_size} for advantages within a group, got "
                f"{self.rollout.group_size}"
            )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature must be > 0 in training: greedy samples of a group are all alike")
        if self.verifier.rewards == "any" and not self.algorithm.takes_any_reward:
            able = [name for name, section in ALGORITHM_SECTIONS.items() if section.takes_any_reward]
            raise ValueError(
                f"verifier.rewards=any: algorithm.name={self.algorithm.name} is made for rewards of 0 and 1; set "
                f"verifier.rewards=binary, or algorithm.name={' or '.join(able)}"
            )
        if self.rollout.trains_truncated and self.model.head_precision == "fp8_grad":
            raise ValueError(
                "rollout.loss_support=sampled has no FP8 products: set model.head_precision to bf16, or drop it"
            )
        if self.rollout.trains_truncated and self.model.head_backend == "liger":
            raise ValueError(
                "rollout.loss_support=sampled is beyond Liger's operator: set model.head_backend to own, or drop it"
            )
        self.algorithm.check_rollout(self.rollout)
        check_best_metric(self.checkpoint, self.eval)
        return self


class SftDataConfig(PromptConfig):
    """The settings of the examples of a supervised run."""

    examples: Path  # A file of JSON lines {"prompt", "response"}.
    sequences_per_step: PositiveInt = 64  # The number of examples that a step trains on.
    # The limit of prompt and response together; the run skips longer examples, and counts and logs them.
    max_tokens: PositiveInt = 4096
    # Each epoch has its own random order, which depends on the seed; false keeps the file's order.
    shuffle: bool = True


class SftConfig(RunConfig):
    """The configuration of `megatron-oreal sft`: supervised training on examples."""

    data: SftDataConfig  # The examples.
    policy: PolicyConfig = PolicyConfig()  # The policy's optimizer.
    rollout: RolloutConfig = RolloutConfig()  # How the evaluation generates responses.
    verifier: VerifierConfig = VerifierConfig()  # How the evaluation judges answers.
    eval: EvalConfig = EvalConfig()  # The evaluation during training.
    alarms: MachineAlarms = MachineAlarms()  # When the log warns.

    effects: ClassVar[Effects] = (
        (TRAINING_ROLLOUTS, never("for sft, which trains on examples: drop it")),
        *GREEDY_ONLY,
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        check_best_metric(self.checkpoint, self.eval)
        return self


class EvalRunConfig(ModelRunConfig):
    """The configuration of `megatron-oreal eval`, which measures a model on data sets."""

    data: PromptConfig = PromptConfig()  # How a prompt becomes tokens.
    rollout: RolloutConfig = RolloutConfig()  # How answers are generated.
    verifier: VerifierConfig = VerifierConfig()  # How answers are judged.
    eval: BenchmarkConfig  # What the evaluation measures.

    effects: ClassVar[Effects] = (
        (("rollout.group_size",), never("for eval: drop it, or set eval.num_samples")),
        (TRAINING_ROLLOUTS, never("for eval, which does not train: drop it")),
        (
            (
                "model.recompute",
                "model.fp8",
                "model.fp8_bf16_ends",
                "model.head_precision",
                "model.head_fp8",
                "model.head_backend",
                "parallel.microbatch_tokens",
            ),
            never("for eval, which does not train: drop it"),
        ),
        *GREEDY_ONLY,
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.rollout.temperature == 0 and self.eval.num_samples:
            raise ValueError("rollout.temperature=0 makes all samples alike: set eval.num_samples=0, or raise it")
        return self


def check_best_metric(checkpoint: CheckpointConfig, evaluation: EvalConfig) -> None:
    known = [f"eval/{name}/{kind}" for name in evaluation.prompts for kind in ("greedy", "pass@1")]
    if checkpoint.best_metric and checkpoint.best_metric not in known:
        raise ValueError(f"checkpoint.best_metric {checkpoint.best_metric!r} is not measured here; known: {known}")


# The first parts of the names of settings that do not change the result of a run. The settings of requests to a judge
# or a reward server are among them. The number of replicas is too, unless the replicas share the optimizer, which the
# checkpoint records.
WITHOUT_INFLUENCE = (
    "run_dir", "model.recompute", "parallel.microbatch_tokens", "parallel.data", "parallel.timeout_seconds",
    "verifier.num_workers", "verifier.judge.cache",
    *(f"verifier.{section}.{name}" for section in ("judge", "remote") for name in HttpConfig.model_fields),
    "rollout.sglang.", "rollout.ledger", "logging.", "alarms.", "watchdog.", "rollout.mismatch_limit",
    "rollout.record", "rollout.replay", "rollout.only", "trackers.", "prometheus.",
)  # fmt: skip
