"""Defines the settings of models, their optimizers and their parallel layout."""

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
# The library that computes the FP8 products. Transformer Engine has one scale for each tensor, for each block of 128
# numbers, or (mx) for each block of 32.
HeadFp8 = Literal["torch", "transformer_engine_tensor", "transformer_engine_block", "transformer_engine_mx"]


class ModelConfig(Section):
    """The settings of the model that is trained or evaluated, and of how its layers compute."""

    path: Path  # The Hugging Face directory with config.json and the initial weights.
    tokenizer: Path | None = None  # The folder of the tokenizer; null uses model.path.
    # The optimizer keeps float32 master weights for bfloat16; auto is bfloat16 on CUDA and float32 on a CPU.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # The implementation of attention and linear layers; auto uses Transformer Engine on CUDA if it is installed.
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"
    # The activations that the backward pass recomputes: those of whole layers (full: least memory, most time), those of
    # recompute_modules (selective), or none. auto is none on a CPU; on CUDA it is the fastest choice that fits into
    # memory.
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    recompute_modules: list[RecomputeModule] = ["mlp"]  # The modules that recompute=selective recomputes.
    # The FP8 recipe of the transformer's linear layers, through Transformer Engine; null computes in model.dtype.
    fp8: Fp8Recipe | None = None
    fp8_bf16_ends: int = Field(default=0, ge=0)  # This many layers at the start and at the end stay in bfloat16.
    # The precision of the products in the log-prob head; their sums are always float32. fp8_grad computes values in
    # bf16 and gradients in FP8.
    head_precision: HeadPrecision = "bf16"
    head_fp8: HeadFp8 = "torch"  # The FP8 products that head_precision=fp8_grad uses.
    # The implementation of the log-probs: our own kernels, or the operator of liger-kernel and liger-cute-kernels,
    # which needs a Hopper GPU, bfloat16 and a vocabulary without padding. auto uses our own, which were faster in all
    # measurements.
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
    """The parallel layout. The number of processes is tensor x context x pipeline x data."""

    tensor: PositiveInt = 1  # The number of processes that share each matrix product (tensor parallelism).
    pipeline: PositiveInt = 1  # The number of pipeline stages; each stage holds consecutive layers.
    # The number of parts of a pipeline stage that take turns (interleaved schedule); null means one part.
    virtual_pipeline: int | None = Field(default=None, ge=2)
    # The number of processes that share the tokens of each sequence, for long responses (context parallelism). Only
    # runs on a CPU support more than 1.
    context: PositiveInt = 1
    # The number of replicas of the model; null uses what the launcher started, or else 1.
    data: PositiveInt | None = None
    # Sequence parallelism: the tensor-parallel processes also share norms and dropout. It needs tensor > 1.
    sequence: bool = False
    # Upper bound of the packed tokens of a micro-batch; a single sequence longer than this gets its own micro-batch.
    microbatch_tokens: PositiveInt = 16384
    timeout_seconds: PositiveInt = 1800  # The time limit of a collective; at the limit the run ends with an error.

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor > 1: set parallel.sequence=false")
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline needs parallel.pipeline > 1: leave it empty")
        return self


class OptimizerConfig(Section):
    """The settings of AdamW and its learning rate. Steps are optimizer steps; a training step may take several."""

    lr: float = Field(default=1e-6, gt=0)  # The learning rate after the warm-up.
    min_lr: float = Field(default=0.0, ge=0)  # The learning rate at the end of the decay.
    warmup_steps: int = Field(default=0, ge=0)  # The learning rate rises linearly from 0 over this many steps.
    decay: Literal["constant", "cosine", "linear"] = "constant"  # The schedule of the learning rate after the warm-up.
    # The optimizer step at which the decay reaches min_lr; skipped steps also count. null uses the end of the run.
    decay_steps: PositiveInt | None = None
    weight_decay: float = Field(default=0.01, ge=0)  # Decoupled weight decay; biases and norms have none.
    beta1: float = Field(default=0.9, ge=0, lt=1)  # The decay rate of the running mean of the gradient.
    beta2: float = Field(default=0.999, ge=0, lt=1)  # The decay rate of the running mean of the squared gradient.
    eps: float = Field(default=1e-8, gt=0)  # The number that Adam adds to the root of that mean square.
    clip_grad: float = Field(default=1.0, ge=0)  # The largest global norm of the gradient; 0 does not clip.
    # The replicas share the optimizer's state instead of each holding all of it (ZeRO-1); auto is true on CUDA with
    # several replicas.
    distributed: bool | Literal["auto"] = "auto"
    # The replicas sum gradients during the backward pass; auto follows distributed, except for experts.
    overlap_grad_reduce: bool | Literal["auto"] = "auto"
    # The dtype of Adam's running means; bfloat16 needs distributed and Transformer Engine.
    moments: Literal["float32", "bfloat16"] = "float32"

    effects: ClassVar[Effects] = ((("min_lr", "decay_steps"), choice("decay", "cosine", "linear")),)

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be <= lr={self.lr}, got {self.min_lr}")
        return self


class TrainableConfig(Section):
    """The settings of a trained model."""

    optimizer: OptimizerConfig = OptimizerConfig()  # The optimizer of the model.


class PolicyConfig(TrainableConfig):
    """The settings of the policy, which starts from model.path."""

    updates_per_step: PositiveInt = 1  # The number of optimizer steps on one set of groups.


HeadInit = Literal["zero", "normal", "kaiming_uniform"]


class ScalarModelConfig(TrainableConfig):
    """The settings of a model of the policy's architecture that computes one number for each token."""

    path: Path | None = None  # The directory with the model's initial weights; null uses model.path.


class CriticConfig(ScalarModelConfig):
    """The settings of PPO's critic, which predicts returns. algorithm.critic_minibatches sets its number of updates."""

    # The initial weights of the head, for a hidden size H: zeros, a normal distribution with standard deviation 1 / (H
    # + 1) (Open-Reasoner-Zero's code), or U(-1 / sqrt H, 1 / sqrt H) (the likely meaning of its paper).
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
    """The settings of OREAL's token-level reward model, whose scores say which tokens matter for a correct answer."""

    # false trains without a reward model: every token weight is 1, and the settings below have no effect.
    enabled: bool = True
    updates_per_step: PositiveInt = 1  # The number of optimizer steps on one set of groups.
