"""Files of one rank: its random states, and all of a checkpoint of the format before torch_dist, which is only read.

step_000050/policy/parameters_t00_p00.safetensors      parameters, by Megatron's global names
step_000050/policy/optimizer_t00_p00_d000.pt           optimizer (with float32 master weights) and schedule
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_oreal.checkpoint.pieces import Trainable
from megatron_oreal.parallel.layout import ParallelLayout


def shard_name(layout: ParallelLayout) -> str:
    return f"t{layout.tensor_rank:02d}_p{layout.pipeline_rank:02d}"


def old_layout_of(models: list[Trainable], layout: ParallelLayout) -> dict[str, int]:
    """Returns what must be the same to read a checkpoint of rank files."""
    return {
        "tensor": layout.tensor_size,
        "pipeline": layout.pipeline_size,
        "virtual_pipeline": layout.virtual_size,
        # 0: any number of replicas can read it
        "data": layout.num_copies if any(model.optimizer_is_sharded for model in models) else 0,
    }


def read_rank_files(folder: Path, model: Trainable, layout: ParallelLayout) -> None:
    """Restores a model from the files that a rank of the same layout has written."""
    saved = load_file(folder / f"parameters_{shard_name(layout)}.safetensors")
    with torch.no_grad():
        for name, parameter in model.parameters():
            parameter.copy_(saved[name])
    replica = layout.copy_rank if model.optimizer_is_sharded else 0
    model.load_training_state(load_on_cpu(folder / f"optimizer_{shard_name(layout)}_d{replica:03d}.pt"))


def load_on_cpu(file: Path) -> Any:
    """Loads a file mapped into memory: replicas that read it share its pages, and no GPU holds a second copy."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, internal, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    state["tracker"] = {name: kept.clone() for name, kept in get_cuda_rng_tracker().get_states().items()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any], *, is_same_layout: bool = True) -> None:
    """With another layout, Megatron's own states of tensor-parallel ranks stay as the start has seeded them."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if is_same_layout:
        get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
