"""The whole configuration of each command: `train` (TrainConfig), `sft` (SftConfig) and `eval` (EvalRunConfig).

What can be checked without loading anything is checked when the configuration is built, and so is whether each setting
that was given has an effect.
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
    """How a prompt becomes tokens; training and evaluation share it."""

    # The tokenizer's chat template, the contents joined as they are, or `template` around the last user message.
    format: Literal["chat", "plain", "template"] = "chat"
    template: str | None = None  # The text of format=template, with {prompt} where the message goes.
    system_prompt: str | None = None  # It is put before prompts that have no system message of their own.
    suffix: str = ""  # It is appended to the last user message, e.g. "Put the final answer in \\boxed{}."
    max_prompt_tokens: PositiveInt = 2048  # Longer prompts are counted, logged and skipped.

    effects: ClassVar[Effects] = ((("system_prompt",), choice("format", "chat", "plain")),)

    @model_validator(mode="after")
    def check_template(self) -> Self:
        if (self.format == "template") != (self.template is not None):
            raise ValueError("data.template and data.format=template belong together: set both or none")
        if self.template is not None and self.template.count("{prompt}") != 1:
            raise ValueError("data.template must hold {prompt} exactly once")
        return self


class DataConfig(PromptConfig):
    """The prompts of a training run."""

    prompts: Path  # A file of JSON lines {"id", "prompt", "answer", "source", "pass_rate"}.
    prompts_per_step: PositiveInt = 64  # The number of groups that a step trains on.
    shuffle: bool = True  # Each epoch has an order of its own, drawn from the seed; false keeps the file's order.
    # How often a prompt comes in an epoch, by its pass rate: [[0.2, 6], [0.6, 4], [0.8, 2]] gives six turns to pass
    # rates below 0.2, and leaves out those at or above 0.8.
    repeats_by_pass_rate: list[tuple[float, int]] = []

    @model_validator(mode="after")
    def check(self) -> Self:
        bounds = [bound for bound, _ in self.repeats_by_pass_rate]
        if bounds != sorted(bounds) or any(repeats < 0 for _, repeats in self.repeats_by_pass_rate):
            raise ValueError("data.repeats_by_pass_rate needs rising bounds and repeats >= 0")
        return self


class EvalConfig(Section):
    """The evaluation on held-out prompts during training."""

    prompts: dict[str, Path] = {}  # Each dataset's name and its file of JSON lines; {} evaluates nothing.
    every: PositiveInt = 10  # Steps between two evaluations; the first one comes before the first step.
    num_samples: int = Field(default=1, ge=0)  # Responses to a prompt at rollout's temperature; 0: greedy only.
    max_prompts: PositiveInt | None = None  # Only the first so many prompts of each dataset are used; null: all.
    num_examples: int = Field(default=3, ge=0)  # Greedy responses that are written out at each evaluation.


class CheckpointConfig(Section):
    """What a run writes besides its metrics, and how often."""

    every: PositiveInt = 50  # Steps between two checkpoints.
    keep_last: PositiveInt = 2  # The newest checkpoints that are kept.
    keep_best: int = Field(default=1, ge=0)  # The checkpoints with the highest best_metric that are kept besides.
    # The metric that says which checkpoints are best, e.g. "eval/gsm8k/greedy"; empty keeps only the last ones.
    best_metric: str = ""
    export_hf: bool = True  # The final policy is written to RUN_DIR/hf.

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
    """What a run records for `megatron-oreal view` besides its metrics and its samples."""

    # The first so many groups of each step are recorded token by token, with log-probs and weights; 0: none.
    rollout_tokens: int = Field(default=0, ge=0)


class ModelRunConfig(Section):
    """What every command that runs a model has."""

    run_dir: Path  # The folder of everything that the run writes; the same command again resumes what is there.
    seed: int = 0  # Everything that is drawn at random depends on it.
    # Updates give the same numbers each time; auto: on a CPU, where that costs little, and not on CUDA.
    deterministic: bool | Literal["auto"] = "auto"
    model: ModelConfig  # The model, and how it computes.
    parallel: ParallelConfig = ParallelConfig()  # How the processes share the model and the batch.

    @model_validator(mode="after")
    def check_effects(self) -> Self:
        self.refuse_idle_settings()
        return self


class RunConfig(ModelRunConfig):
    """What every kind of training has."""

    num_steps: PositiveInt  # The length of the run.
    checkpoint: CheckpointConfig = CheckpointConfig()  # What is written, and how often.
    watchdog: WatchdogConfig = WatchdogConfig()  # When the run counts as hanging.
    trackers: TrackersConfig = TrackersConfig()  # The experiment trackers that get the run's records.
    prometheus: PrometheusConfig = PrometheusConfig()  # The endpoint that says what the trainer is doing.


ON_POLICY_WORDS = (
    "while every sample comes from the policy that it trains: drop it, or raise rollout.staleness, or set "
    "rollout.unfinished to resume, or rollout.corrects to always"
)
CORRECTIONS = tuple(f"rollout.{name}" for name in CORRECTION_SETTINGS)
# The settings of rollouts that only the training on outcome rewards uses.
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
        ("rollout.temperature",),  # A temperature of 0 says what is the case.
        condition(lambda run: run.eval.num_samples > 0 or run.rollout.temperature == 0, GREEDY_WORDS),
    ),
)


class TrainConfig(RunConfig):
    """`megatron-oreal train`: reinforcement learning on outcome rewards."""

    data: DataConfig  # The prompts.
    rollout: RolloutConfig = RolloutConfig()  # How responses are generated.
    verifier: VerifierConfig = VerifierConfig()  # How responses are rewarded.
    algorithm: Annotated[AnyAlgorithm, Field(discriminator="name")] = OrealConfig()  # How the policy learns.
    policy: PolicyConfig = PolicyConfig()  # The policy's optimizer.
    eval: EvalConfig = EvalConfig()  # The evaluation during training.
    logging: LoggingConfig = LoggingConfig()  # What is recorded besides metrics and samples.
    alarms: AlarmsConfig = AlarmsConfig()  # What the log warns of.

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
        """Whether samples may come from an older policy than the one that they train."""
        return self.rollout.staleness > 0 or self.rollout.resumes

    @property
    def corrects_samples(self) -> bool:
        """Whether the settings of `rollout` ask for a correction of samples that are not of the trained policy."""
        return self.is_off_policy or self.rollout.corrects == "always"

    @property
    def correction(self) -> Correction | None:
        """How the losses correct for the distribution that was sampled from; None where nothing is corrected."""
        is_asked_for = self.corrects_samples and self.algorithm.takes_importance_weights
        return self.rollout.as_correction() if is_asked_for else None

    @property
    def has_fresh_ratios(self) -> bool:
        """Whether the ratios of a step's first update are 1, as they are to the trainer's own policy before it."""
        return self.correction is None or self.correction.old_logprobs == "trainer"

    @model_validator(mode="before")
    @classmethod
    def name_the_algorithm(cls, settings: Any) -> Any:
        """Takes OREAL where the file names no algorithm."""
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
    """The examples of a supervised run."""

    examples: Path  # A file of JSON lines {"prompt", "response"}.
    sequences_per_step: PositiveInt = 64  # The number of examples that a step trains on.
    # The limit of prompt and response together; longer examples are counted, logged and skipped.
    max_tokens: PositiveInt = 4096
    shuffle: bool = True  # Each epoch has an order of its own, drawn from the seed; false keeps the file's order.


class SftConfig(RunConfig):
    """`megatron-oreal sft`: supervised training on examples."""

    data: SftDataConfig  # The examples.
    policy: PolicyConfig = PolicyConfig()  # The policy's optimizer.
    rollout: RolloutConfig = RolloutConfig()  # How the evaluation samples.
    verifier: VerifierConfig = VerifierConfig()  # How the evaluation's answers are judged.
    eval: EvalConfig = EvalConfig()  # The evaluation during training.
    alarms: MachineAlarms = MachineAlarms()  # What the log warns of.

    effects: ClassVar[Effects] = (
        (TRAINING_ROLLOUTS, never("for sft, which trains on examples: drop it")),
        *GREEDY_ONLY,
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        check_best_metric(self.checkpoint, self.eval)
        return self


class EvalRunConfig(ModelRunConfig):
    """`megatron-oreal eval`: measures a model on datasets."""

    data: PromptConfig = PromptConfig()  # How a prompt becomes tokens.
    rollout: RolloutConfig = RolloutConfig()  # How answers are generated.
    verifier: VerifierConfig = VerifierConfig()  # How answers are judged.
    eval: BenchmarkConfig  # What is measured.

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


# Beginnings of the settings that do not change what a run computes. How a judge or a reward server is asked is one of
# them. So is the number of replicas, unless the replicas share the optimizer, which the checkpoint knows.
WITHOUT_INFLUENCE = (
    "run_dir", "model.recompute", "parallel.microbatch_tokens", "parallel.data", "parallel.timeout_seconds",
    "verifier.num_workers", "verifier.judge.cache",
    *(f"verifier.{section}.{name}" for section in ("judge", "remote") for name in HttpConfig.model_fields),
    "rollout.sglang.", "rollout.ledger", "logging.", "alarms.", "watchdog.", "rollout.mismatch_limit",
    "rollout.record", "rollout.replay", "rollout.only", "trackers.", "prometheus.",
)  # fmt: skip
