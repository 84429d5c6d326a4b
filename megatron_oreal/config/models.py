"""The settings of models, their optimizers and their parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.section import Section

Fp8Recipe = Literal["tensorwise", "blockwise", "mxfp8", "delayed"]
HeadPrecision = Literal["fp32", "bf16", "fp8_grad", "fp8"]
RecomputeModule = Literal["core_attn", "layernorm", "mlp", "moe", "shared_experts"]
# Who multiplies, and how many numbers share a scale: a tensor's, a row's, a block's of 128 or (mx) of 32.
HeadFp8 = Literal[
    "torch_row", "torch_tensor", "transformer_engine_tensor", "transformer_engine_block", "transformer_engine_mx"
]


class ModelConfig(Section):
    path: Path  # Hugging Face directory: config.json and safetensors
    tokenizer: Path | None = None  # defaults to model.path
    # bfloat16 keeps float32 master weights; auto: bfloat16 on CUDA, float32 on a CPU
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    implementation: Literal["auto", "local", "transformer_engine"] = "auto"  # auto: TE on CUDA when importable
    # Activations that the backward pass computes again: those of whole layers, or of recompute_modules. auto: none on a
    # CPU; on CUDA none, selective or full, whichever is the first to fit the memory.
    recompute: Literal["auto", "none", "selective", "full"] = "auto"
    recompute_modules: list[RecomputeModule] = ["mlp"]  # of recompute=selective
    fp8: Fp8Recipe | None = None  # of the transformer's linear layers, through Transformer Engine; null: model.dtype
    fp8_bf16_ends: int = Field(default=0, ge=0)  # layers at the start, and as many at the end, that stay in bfloat16
    # Of the log-probs' products, float32 sums always: fp8_grad, FP8 for gradients alone; fp8, for values too, as long
    # as they stay near those of bf16 on the run's own batches.
    head_precision: HeadPrecision = "bf16"
    head_fp8: HeadFp8 = "torch_row"  # the FP8 products of head_precision

    @property
    def tokenizer_path(self) -> Path:
        return self.tokenizer or self.path

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.fp8_bf16_ends and self.fp8 in (None, "delayed"):
            raise ValueError(f"model.fp8_bf16_ends={self.fp8_bf16_ends} needs model.fp8=tensorwise, blockwise or mxfp8")
        if self.head_fp8 != "torch_row" and self.head_precision not in ("fp8_grad", "fp8"):
            raise ValueError(f"model.head_fp8={self.head_fp8} needs model.head_precision=fp8_grad or fp8")
        return self


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: int | None = Field(default=None, ge=2)  # model chunks a pipeline rank, interleaved schedule
    data: PositiveInt | None = None  # None: what the launcher started, else 1
    sequence: bool = False  # sequence parallelism, needs tensor > 1
    microbatch_tokens: PositiveInt = 16384  # packed tokens a micro-batch at most; a longer sequence is alone in its own
    timeout_seconds: PositiveInt = 1800  # of every collective

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.sequence and self.tensor == 1:
            raise ValueError("parallel.sequence needs parallel.tensor > 1: set parallel.sequence=false")
        if self.virtual_pipeline is not None and self.pipeline == 1:
            raise ValueError("parallel.virtual_pipeline needs parallel.pipeline > 1: leave it empty")
        return self


class OptimizerConfig(Section):
    lr: float = Field(default=1e-6, gt=0)
    min_lr: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)  # linear from 0, in optimizer steps
    decay: Literal["constant", "cosine"] = "constant"
    decay_steps: PositiveInt | None = None  # where cosine reaches min_lr; None: the end of the run
    weight_decay: float = Field(default=0.01, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.999, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    clip_grad: float = Field(default=1.0, ge=0)  # global norm; 0: no clipping
    # Optimizer state sharded over data-parallel ranks; auto: on CUDA with more than one of them
    distributed: bool | Literal["auto"] = "auto"
    # Gradients are summed over data parallelism while the backward pass goes on; auto: as above, but not for experts
    overlap_grad_reduce: bool | Literal["auto"] = "auto"
    moments: Literal["float32", "bfloat16"] = "float32"  # Adam's; bfloat16 needs distributed and Transformer Engine

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr must be <= lr={self.lr}, got {self.min_lr}")
        return self


class TrainableConfig(Section):
    optimizer: OptimizerConfig = OptimizerConfig()
    updates_per_step: PositiveInt = 1  # optimizer steps on one set of groups


HeadInit = Literal["zero", "normal", "uniform"]


class CriticConfig(TrainableConfig):
    path: Path | None = None  # initial weights; None: model.path
    head_init: HeadInit = "zero"  # normal: N(0, 1 / (hidden + 1)); uniform: U(-sqrt 5, sqrt 5)


class RewardModelConfig(TrainableConfig):
    enabled: bool = True  # False: every token weight is 1
    path: Path | None = None  # initial weights; None: model.path
