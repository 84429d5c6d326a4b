"""Every setting, with its one default and its meaning. Imports no torch: a dry run works on a login node.

A run is configured by a YAML file and dotted overrides (`rollout.group_size=8`). Unknown keys are errors, and what can
be checked without loading anything is checked when the configuration is built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.algorithms import OrealConfig, OutcomeConfig, PpoConfig
from megatron_oreal.config.evaluation import BenchmarkConfig
from megatron_oreal.config.models import CriticConfig, ModelConfig, ParallelConfig, RewardModelConfig, TrainableConfig
from megatron_oreal.config.rollout import RolloutConfig
from megatron_oreal.config.section import Section


class PromptConfig(Section):
    """How a prompt becomes tokens; training and evaluation share it."""

    # The tokenizer's chat template, the contents joined as they are, or `template` around the last user message.
    format: Literal["chat", "plain", "template"] = "chat"
    template: str | None = None  # with {prompt} where the message goes
    system_prompt: str | None = None  # put before prompts without one of their own
    suffix: str = ""  # appended to the last user message, e.g. "Put the final answer in \\boxed{}."
    max_prompt_tokens: PositiveInt = 2048  # longer prompts are counted, logged and skipped

    @model_validator(mode="after")
    def check_template(self) -> Self:
        if (self.format == "template") != (self.template is not None):
            raise ValueError("data.template and data.format=template belong together: set both or none")
        if self.template is not None and self.template.count("{prompt}") != 1:
            raise ValueError("data.template must hold {prompt} exactly once")
        return self


class DataConfig(PromptConfig):
    prompts: Path  # JSONL of {"id", "prompt", "answer", "source", "pass_rate"}
    prompts_per_step: PositiveInt = 64
    shuffle: bool = True
    # (upper bound of pass_rate, repeats an epoch): [[0.2, 6], [0.6, 4], [0.8, 2]]; at or above the last bound: dropped.
    repeats_by_pass_rate: list[tuple[float, int]] = []

    @model_validator(mode="after")
    def check(self) -> Self:
        bounds = [bound for bound, _ in self.repeats_by_pass_rate]
        if bounds != sorted(bounds) or any(repeats < 0 for _, repeats in self.repeats_by_pass_rate):
            raise ValueError("data.repeats_by_pass_rate needs rising bounds and repeats >= 0")
        return self


AnswerRule = Literal["last_box", "answer_tags", "conclusion"]


class VerifierConfig(Section):
    num_workers: PositiveInt = 4  # processes for comparisons that take algebra; started when there is one
    cpu_seconds: float = Field(default=3.0, gt=0)  # of one comparison, then the worker is ended
    # Timeouts among the samples of one prompt that are left out of training; where there are more, all count as wrong.
    max_timeouts: int = Field(default=1, ge=0)
    # Where the answer stands: in the last box, in the last box within <answer> tags, or in the one after the reasoning.
    answer_rule: AnswerRule = "last_box"
    require_stop: bool = True  # a response cut at the length limit is wrong, whatever it says


class EvalConfig(Section):
    prompts: dict[str, Path] = {}  # dataset name -> JSONL
    every: PositiveInt = 10  # steps; the first evaluation is before the first step
    num_samples: int = Field(default=1, ge=0)  # a prompt, at rollout's temperature; 0: greedy only
    max_prompts: PositiveInt | None = None  # the first ones of each dataset
    num_examples: int = Field(default=3, ge=0)  # greedy answers written out at each evaluation


class CheckpointConfig(Section):
    every: PositiveInt = 50  # steps
    keep_last: PositiveInt = 2
    keep_best: int = Field(default=1, ge=0)
    best_metric: str = ""  # e.g. "eval/gsm8k/greedy"; empty: only the last ones are kept
    export_hf: bool = True  # write the final policy to RUN_DIR/hf


class ModelRunConfig(Section):
    """What every command that runs a model has."""

    run_dir: Path
    seed: int = 0
    deterministic: bool = True  # deterministic torch algorithms where the device has them
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()


class RunConfig(ModelRunConfig):
    """What every kind of training has."""

    num_steps: PositiveInt
    checkpoint: CheckpointConfig = CheckpointConfig()


class TrainConfig(RunConfig):
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    algorithm: Annotated[OrealConfig | OutcomeConfig | PpoConfig, Field(discriminator="name")] = OrealConfig()
    policy: TrainableConfig = TrainableConfig()
    reward_model: RewardModelConfig = RewardModelConfig()  # of oreal; the others leave it alone
    critic: CriticConfig = CriticConfig()  # of ppo; its minibatches and epochs take the place of updates_per_step
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="before")
    @classmethod
    def name_the_algorithm(cls, settings: Any) -> Any:
        """Without a name it is oreal."""
        algorithm = settings.get("algorithm") or {} if isinstance(settings, dict) else None
        return settings | {"algorithm": {"name": "oreal"} | algorithm} if isinstance(algorithm, dict) else settings

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.rollout.group_size < 2 and self.algorithm.name == "oreal":
            raise ValueError(
                f"rollout.group_size must be >= 2 for advantages within a group, got {self.rollout.group_size}"
            )
        if self.rollout.temperature == 0:
            raise ValueError("rollout.temperature must be > 0 in training: greedy samples of a group are all alike")
        check_best_metric(self.checkpoint, self.eval)
        return self


class SftDataConfig(PromptConfig):
    examples: Path  # JSONL of {"prompt", "response"}
    sequences_per_step: PositiveInt = 64
    max_tokens: PositiveInt = 4096  # of prompt and response; longer examples are counted, logged and skipped
    shuffle: bool = True


class SftConfig(RunConfig):
    data: SftDataConfig
    policy: TrainableConfig = TrainableConfig()
    rollout: RolloutConfig = RolloutConfig()  # for the evaluation
    verifier: VerifierConfig = VerifierConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def check(self) -> Self:
        check_best_metric(self.checkpoint, self.eval)
        return self


class EvalRunConfig(ModelRunConfig):
    data: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()  # group_size is not used: eval.num_samples is
    verifier: VerifierConfig = VerifierConfig()
    eval: BenchmarkConfig

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.rollout.temperature == 0 and self.eval.num_samples:
            raise ValueError("rollout.temperature=0 makes all samples alike: set eval.num_samples=0, or raise it")
        return self


def check_best_metric(checkpoint: CheckpointConfig, evaluation: EvalConfig) -> None:
    known = [f"eval/{name}/{kind}" for name in evaluation.prompts for kind in ("greedy", "pass@1")]
    if checkpoint.best_metric and checkpoint.best_metric not in known:
        raise ValueError(f"checkpoint.best_metric {checkpoint.best_metric!r} is not measured here; known: {known}")
