"""Megatron's DDP, optimizer and schedule for one trainable model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oreal.config import OptimizerConfig
from megatron_oreal.models.build import PackedGPTModel


@dataclass(slots=True)
class Training:
    """What a model that learns has besides its weights."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    is_sharded: bool  # data-parallel ranks hold different parts of the optimizer

    @property
    def inner_optimizers(self) -> list[torch.optim.Optimizer]:
        """The torch optimizers inside Megatron's; they hold the float32 masters, or this rank's shards of them."""
        chained = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [optimizer.optimizer for optimizer in chained if optimizer.optimizer is not None]

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the model's parameters, on this rank and for this layout."""
        inner = self.inner_optimizers
        return {
            "optimizers": [optimizer.state_dict() for optimizer in inner],
            "masters": [[copy_of(param) for param in parameters(optimizer)] for optimizer in inner],
            "num_updates": self.schedule.num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The model's parameters must be restored already."""
        for optimizer, saved, masters in zip(self.inner_optimizers, state["optimizers"], state["masters"], strict=True):
            optimizer.load_state_dict(saved)
            with torch.no_grad():
                for parameter, master in zip(parameters(optimizer), masters, strict=True):
                    parameter.copy_(master)
        self.schedule.num_steps = 0
        self.schedule.step(state["num_updates"])


def prepare_training(
    chunks: list[PackedGPTModel], config: TransformerConfig, settings: OptimizerConfig, num_updates: int
) -> Training:
    """Wraps the chunks for data parallelism; `num_updates` is where a cosine schedule without decay_steps ends."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=settings.distributed, overlap_grad_reduce=False
    )
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    half = config.params_dtype is torch.bfloat16
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
        use_distributed_optimizer=settings.distributed,
    )
    # The standard overrides: no weight decay for biases and norms.
    optimizer = get_megatron_optimizer(
        optimizer_config,
        wrapped,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_gradients
    return Training(wrapped, optimizer, build_schedule(optimizer, settings, num_updates), settings.distributed)


def copy_of(parameter: torch.Tensor) -> torch.Tensor:
    """Of its own storage: a shard is a view of a larger buffer, which would be saved with it."""
    return parameter.detach().cpu().clone()


def parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def finalize_gradients(model: list[torch.nn.Module], _num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Sums gradients over data parallelism and ties; Megatron would also divide by the number of tokens.

    With `calculate_per_token_loss` Megatron neither averages over micro-batches nor over data-parallel ranks, and our
    losses are divided by global counts: so the sum is the gradient.
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
