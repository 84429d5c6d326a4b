"""Builds Megatron's DDP, optimizer and schedule for one trainable model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oreal.checkpoint.pieces import OptimizerProgress
from megatron_oreal.config import OptimizerConfig
from megatron_oreal.models.build import PackedGPTModel
from megatron_oreal.models.cuda_optimizer import use_foreach_norms, use_fused_adam
from megatron_oreal.models.optimizer_state import num_adam_steps, start_adam_at
from megatron_oreal.parallel.layout import ParallelLayout


@dataclass(slots=True)
class Training:
    """The training state of a model besides its weights."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    is_sharded: bool  # data-parallel ranks hold different parts of the optimizer
    is_on_cuda: bool = False
    overlaps_reduction: bool = False  # sums gradients over data parallelism during the backward pass

    @property
    def inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """Returns the torch optimizers inside Megatron's, which hold the float32 masters or this rank's shards."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [optimizer.optimizer for optimizer in chained if optimizer.optimizer is not None]

    def progress(self) -> OptimizerProgress:
        return OptimizerProgress(self.schedule.num_steps, num_adam_steps(self.optimizer))

    def start_at(self, progress: OptimizerProgress) -> None:
        """Puts schedule and optimizer where they were; masters and moments are still to be filled."""
        start_adam_at(self.optimizer, progress.num_adam_steps, self.is_on_cuda)
        self.schedule.num_steps = 0
        self.schedule.step(progress.num_updates)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that the next step needs besides the model's parameters, for this rank and layout."""
        inner = self.inner_optimizers
        return {
            "optimizers": [optimizer.state_dict() for optimizer in inner],
            "masters": [[copy_of(param) for param in parameters(optimizer)] for optimizer in inner],
            "num_updates": self.schedule.num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state. The model's parameters must be restored before."""
        for optimizer, saved, masters in zip(self.inner_optimizers, state["optimizers"], state["masters"], strict=True):
            optimizer.load_state_dict(saved)
            if self.is_on_cuda:
                use_fused_adam(optimizer)  # a state that was saved elsewhere may name another implementation
            with torch.no_grad():
                for parameter, master in zip(parameters(optimizer), masters, strict=True):
                    parameter.copy_(master)
        self.schedule.num_steps = 0
        self.schedule.step(state["num_updates"])


def prepare_training(
    chunks: list[PackedGPTModel],
    config: TransformerConfig,
    settings: OptimizerConfig,
    num_updates: int,
    layout: ParallelLayout,
) -> Training:
    """Wraps the chunks for data parallelism. A decay without decay_steps ends at update `num_updates`."""
    is_on_cuda, half = layout.device.type == "cuda", config.params_dtype is torch.bfloat16
    is_sharded, overlaps = chosen(settings, config, layout)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=is_sharded, overlap_grad_reduce=overlaps
    )
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    optimizer_config = MegatronOptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=half,
        params_dtype=config.params_dtype,
        use_distributed_optimizer=is_sharded,
        **moment_settings(settings, is_sharded),
    )
    if is_on_cuda:
        use_foreach_norms()
    # Megatron's standard overrides apply no weight decay to biases and norms.
    optimizer = get_megatron_optimizer(
        optimizer_config,
        wrapped,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_gradients
    if overlaps:  # only the backward pass of the last micro-batch starts the reductions
        config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [chunk.no_sync for chunk in wrapped]
    schedule = build_schedule(optimizer, settings, num_updates)
    training = Training(wrapped, optimizer, schedule, is_sharded, is_on_cuda, overlaps)
    if is_on_cuda:
        for inner in training.inner_optimizers:
            use_fused_adam(inner)
    return training


def chosen(settings: OptimizerConfig, config: TransformerConfig, layout: ParallelLayout) -> tuple[bool, bool]:
    """Returns (ranks share the optimizer state, reductions overlap with the backward pass); the settings may be auto.

    auto disables the overlap for experts. An expert that no token of the last micro-batch chose has no gradient, and
    Megatron would wait for it.
    """
    replicated_on_cuda = layout.device.type == "cuda" and layout.num_copies > 1
    is_sharded = replicated_on_cuda if settings.distributed == "auto" else settings.distributed
    overlaps = settings.overlap_grad_reduce
    if overlaps == "auto":
        overlaps = replicated_on_cuda and config.num_moe_experts is None
    return is_sharded, overlaps


def moment_settings(settings: OptimizerConfig, is_sharded: bool) -> dict[str, Any]:
    """Returns arguments of Megatron's OptimizerConfig. Raises ValueError if Adam's moments cannot be bfloat16."""
    if settings.moments == "float32":
        return {}
    if not is_sharded:
        raise ValueError("optimizer.moments=bfloat16 needs optimizer.distributed=true: set it, or moments=float32")
    if not HAVE_TE:
        raise ValueError("optimizer.moments=bfloat16 needs Transformer Engine's Adam: install it, or set float32")
    return {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }


def copy_of(parameter: torch.Tensor) -> torch.Tensor:
    """Copies the tensor, because a shard is a view of a larger buffer, and saving a view saves the whole buffer."""
    return parameter.detach().cpu().clone()


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def finalize_gradients(model: list[torch.nn.Module], _num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Sums gradients over data parallelism and tied weights. Megatron would also divide by the number of tokens.

    With `calculate_per_token_loss` Megatron averages neither over micro-batches nor over data-parallel ranks. Our
    losses are already divided by global counts, so the sum is the gradient.
    """
    finalize_model_grads(model, None, **kwargs)


def build_schedule(
    optimizer: MegatronOptimizer, settings: OptimizerConfig, num_updates: int
) -> OptimizerParamScheduler:
    decay_steps = max(settings.decay_steps or num_updates, settings.warmup_steps + 1)
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=settings.decay,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
