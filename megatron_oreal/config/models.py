"""The settings of models, their optimizers and their parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from typing_extensions import Self

from megatron_oreal.config.effects import Effects, choice
from megatron_oreal.config.section import Section

Fp8Recipe = Literal["tensorwise", "blockwise", "mxfp8", "delayed"]
HeadPrecision = Literal["fp32", "bf16", "fp8_grad"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
HeadBackend = Literal["auto", "own", "liger"]
# The library that multiplies. Transformer Engine has one scale a tensor, a block of 128 numbers, or (mx) a block of 32.
HeadFp8 = Literal["torch", "transformer_engine_tensor", "transformer_engine_block", "transformer_engine_mx"]


class ModelConfig(Section):
    """The model that is trained or evaluated, and how its layers compute."""

    path: Path  # The Hugging Face directory with config.json and the initial weights.
    tokenizer: Path | None = None  # The folder of the tokenizer; null takes model.path.
    # bfloat16 keeps float32 master weights in the optimizer; auto is bfloat16 on CUDA and float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # The implementation of attention and linear layers; auto takes Transformer Engine on CUDA where it can be imported.
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    # Which activations the backward pass computes again: those of whole layers (full: least memory, most time), those
    # of recompute_modules (selective), or none. auto is none on a CPU, and on CUDA the first that fits the memory.
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    recompute_modules: list[RecomputeModule] = ["mlp"]  # The modules of recompute=selective.
    # The FP8 recipe of the transformer's linear layers, through Transformer Engine; null computes in model.dtype.
    fp8: Fp8Recipe | None = None
    fp8_bf16_ends: int = Field(default=0, ge=0)  # So many layers at the start and at the end stay in bfloat16.
    # The products of the log-probs; their sums are always float32. fp8_grad has bf16 values and FP8 gradients.
    head_precision: HeadPrecision = "bf16"
    head_fp8: HeadFp8 = "torch"  # Which FP8 products head_precision=fp8_grad uses.
    # What computes the log-probs: our own kernels, or the operator of liger-kernel and liger-cute-kernels, which needs
    # a Hopper GPU, bfloat16 and a vocabulary without padding. auto is our own: they were faster in all measurements.
    head_backend: HeadBackend = "auto"

    effects: ClassVar[Effects] = (
        (("recompute_modules",), choice("recompute", "selective")),
        (("head_fp8",), choice("head_precision", "fp8_grad")),
        (("head_backend",), choice("head_precision", "bf16")),
    )

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer or self.path

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.fp8_bf16_ends and self.fp8 in (None, "delayed"):
            raise ValueError(f"model.fp8_bf16_ends={self.fp8_bf16_ends} needs model.fp8=tensorwise, blockwise or mxfp8")
        return self


class ParallelConfig(Section):
    """How the processes share the model and the batch. Their number is tensor x context x pipeline x data."""

    tensor: PositiveInt = 1  # Processes that share each matrix product.
    pipeline: PositiveInt = 1  # Processes that have consecutive layers.
    # The layers of a pipeline process are cut into so many parts that take turns; null: one part.
    virtual_pipeline: int | None = Field(default=None, ge=2)
    # Processes that share the tokens of each sequence, for long responses: context parallelism. On a CPU only so far.
    context: PositiveInt = 1
    data: PositiveInt | None = None  # Replicas of the model; null takes what the launcher started, or else 1.
    sequence: bool = False  # Sequence parallelism: norms and dropout are shared too. It needs tensor > 1.
    # Upper bound of the packed tokens of a micro-batch; a single sequence longer than this gets its own micro-batch.
    microbatch_tokens: PositiveInt = 16384
    timeout_seconds: PositiveInt = 1800  # How long a collective may take before the run ends with an error.

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor > 1: set parallel.sequence=false")
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline needs parallel.pipeline > 1: leave it empty")
        return self


class OptimizerConfig(Section):
    """AdamW and its learning rate. Steps are optimizer steps: a training step may have several."""

    lr: float = Field(default=1e-6, gt=0)  # The learning rate after the warm-up.
    min_lr: float = Field(default=0.0, ge=0)  # Where the decay ends.
    warmup_steps: int = Field(default=0, ge=0)  # The learning rate rises linearly from 0 for so many steps.
    decay: Literal["constant", "cosine", "linear"] = "constant"  # The course of the learning rate after the warm-up.
    # The optimizer step at which the decay reaches min_lr, where skipped ones count too; null: the end of the run.
    decay_steps: PositiveInt | None = None
    weight_decay: float = Field(default=0.01, ge=0)  # Decoupled weight decay; biases and norms have none.
    beta1: float = Field(default=0.9, ge=0, lt=1)  # The decay of the gradient's running mean.
    beta2: float = Field(default=0.999, ge=0, lt=1)  # The decay of its running mean square.
    eps: float = Field(default=1e-8, gt=0)  # It is added to the root of the mean square.
    clip_grad: float = Field(default=1.0, ge=0)  # The largest global norm of the gradient; 0 does not clip.
    # The replicas share the optimizer's state instead of each holding all of it; auto: on CUDA with several replicas.
    distributed: bool | Literal["auto"] = "auto"
    # Gradients are summed over the replicas while the backward pass goes on; auto: as distributed, not for experts.
    overlap_grad_reduce: bool | Literal["auto"] = "auto"
    # Adam's running means; bfloat16 needs distributed and Transformer Engine.
    moments: Literal["float32", "bfloat16"] = "float32"

    effects: ClassVar[Effects] = ((("min_lr", "decay_steps"), choice("decay", "cosine", "linear")),)

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be <= lr={self.lr}, got {self.min_lr}")
        return self


class TrainableConfig(Section):
    """A model that is trained."""

    optimizer: OptimizerConfig = OptimizerConfig()  # Its optimizer.


class PolicyConfig(TrainableConfig):
    """The policy, which starts from model.path."""

    updates_per_step: PositiveInt = 1  # Optimizer steps on one set of groups.


HeadInit = Literal["zero", "normal", "kaiming_uniform"]


class ScalarModelConfig(TrainableConfig):
    """A model of the policy's architecture that gives one number a token."""

    path: Path | None = None  # The directory with its initial weights; null takes model.path.


class CriticConfig(ScalarModelConfig):
    """PPO's critic predicts the reward that is to come. algorithm.critic_minibatches says how often it is updated."""

    # The head's initial weights, for a hidden size H: zeros, draws from a normal distribution of deviation 1 / (H + 1)
    # (Open-Reasoner-Zero's code), or draws from U(-1 / sqrt H, 1 / sqrt H) (its paper, as it is most likely meant).
    head_init: HeadInit = "zero"

    @field_validator("head_init", mode="before")
    @classmethod
    def refuse_literal_bound(cls, value: Any) -> Any:
        if value == "uniform":
            raise ValueError(
                "critic.head_init=uniform is no longer offered: draws from U(-sqrt 5, sqrt 5) give values far outside "
                "[0, 1], where returns are; set kaiming_uniform, with the bound 1 / sqrt(hidden size)"
            )
        return value


class RewardModelConfig(ScalarModelConfig):
    """OREAL's token-level reward model: it learns which tokens speak for a correct answer, and weighs them."""

    # false trains without a reward model: every token weight is 1, and the settings below wait until it is true again.
    enabled: bool = True
    updates_per_step: PositiveInt = 1  # Optimizer steps on one set of groups.
