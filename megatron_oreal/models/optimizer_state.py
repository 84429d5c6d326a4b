"""What Megatron's optimizers keep, by parameter and without their own order: this is what checkpoints hold.

Without a sharded optimizer, a rank keeps the master weights and moments of all its parameters; with one, those of a
range of each parameter's elements, which differs between replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_oreal.checkpoint.pieces import OptimizerTensors
from megatron_oreal.models.cuda_optimizer import use_fused_adam

MASTER = "fp32_param"  # Megatron's name


def parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Returns Megatron's optimizers that hold a torch optimizer each: dense parameters and experts have their own."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if part.optimizer is not None]


def optimizer_tensors(optimizer: MegatronOptimizer, names: dict[int, str]) -> Iterator[OptimizerTensors]:
    """`names`: those of the model's parameters, by id. The tensors are the optimizer's own."""
    for part in parts_of(optimizer):
        for parameter, begin, main in optimized(part):
            tensors = {MASTER: main} if main.dtype is torch.float32 is not parameter.dtype else {}
            state = part.optimizer.state.get(main, {})
            tensors |= {
                name: value
                for name, value in sorted(state.items())
                if isinstance(value, Tensor) and value.shape == main.shape
            }
            yield OptimizerTensors(names[id(parameter)], begin, tensors)


def optimized(part: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yields (the model's parameter, the first of its elements that are optimized here, what torch optimizes)."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, order) in part.model_param_group_index_map.items():
            begin = part._get_model_param_range_map(parameter)["param"].start
            yield parameter, begin, part.optimizer.param_groups[group]["params"][order]
    elif hasattr(part, "float16_groups"):
        for halves, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from ((half, 0, master) for half, master in zip(halves, masters, strict=True))
        yield from ((parameter, 0, parameter) for group in part.fp32_from_fp32_groups for parameter in group)
    else:
        for group in part.optimizer.param_groups:
            yield from ((parameter, 0, parameter) for parameter in group["params"])


def num_adam_steps(optimizer: MegatronOptimizer) -> int:
    """Returns how many steps Adam has taken: torch counts them for each parameter, others for each group."""
    for part in parts_of(optimizer):
        counts = [*part.optimizer.state.values(), *part.optimizer.param_groups]
        for counted in counts:
            if "step" in counted:
                return int(counted["step"])
    return 0


def start_adam_at(optimizer: MegatronOptimizer, num_steps: int, is_on_cuda: bool) -> None:
    """Makes the moments, to be filled in place, as if Adam had taken so many steps."""
    for part in parts_of(optimizer):
        if num_steps:
            part.init_state_fn(part.optimizer, part.config)
        if not isinstance(part.optimizer, torch.optim.Adam):  # AdamW is one
            for group in part.optimizer.param_groups:
                group["step"] = num_steps
        elif num_steps:
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(num_steps))
        if is_on_cuda:
            use_fused_adam(part.optimizer)
