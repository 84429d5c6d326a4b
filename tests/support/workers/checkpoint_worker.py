"""Run by torchrun: every layout's checkpoint is restored by every other one, and on its own it goes on bit for bit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_oreal.checkpoint.train_state import Progress, TrainState
from megatron_oreal.config import CheckpointConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import pack
from megatron_oreal.models import parallel
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from tests.support.tiny_models import write_tiny_model
from tests.support.workers.layouts_worker import SEQUENCES, build, plan_of, weighted_loss

# name: (layout, sharded optimizer)
LAYOUTS = {
    "TP2": (ParallelConfig(tensor=2), False),
    "TP2 sequence, distributed": (ParallelConfig(tensor=2, sequence=True), True),
    "PP2": (ParallelConfig(pipeline=2), False),
    "PP2 virtual": (ParallelConfig(pipeline=2, virtual_pipeline=2), False),
    "DP2": (ParallelConfig(), False),
    "CP2 distributed": (ParallelConfig(context=2), True),
    "DP2 distributed": (ParallelConfig(), True),
}
CURSOR: Any = {"position": 3}


def main(folder: Path) -> None:
    layout = parallel.initialize(ParallelConfig(), seed=0)
    if layout.is_main:
        write_tiny_model(folder / "model", tied=True, num_layers=4)
    dist.barrier()
    parallel.destroy_groups()
    saved = {name: first_run(folder, name) for name in LAYOUTS}
    for number, name in enumerate(LAYOUTS):
        # Each reads its own and two others, so that each pair of kinds is met.
        sources = [list(saved)[(number + shift) % len(saved)] for shift in (0, 1, 3)]
        second_run(folder, name, {source: saved[source] for source in sources})
    print(f"rank {dist.get_rank()} passed", flush=True)
    dist.destroy_process_group()


def state_of(folder: Path, name: str, layout: ParallelLayout) -> tuple[TrainableModel, TrainState]:
    _, distributed = LAYOUTS[name]
    optimizer = OptimizerConfig(lr=1e-3, distributed=distributed, warmup_steps=3, decay="cosine")
    model = build(folder / "model", layout, training=TrainableConfig(optimizer=optimizer), dtype="bfloat16")
    return model, TrainState(folder / name, {"policy": model}, layout, CheckpointConfig(keep_last=9))


def train(model: TrainableModel) -> dict[str, float]:
    return model.train_step(pack(SEQUENCES, plan_of(model.layout)), weighted_loss)


def first_run(folder: Path, name: str) -> list[dict[str, float]]:
    """Saves after two steps while the third one runs. Returns the metrics of the steps after the save."""
    layout = parallel.initialize(LAYOUTS[name][0], seed=0)
    model, state = state_of(folder, name, layout)
    for _ in range(2):
        train(model)
    state.begin(Progress(2, CURSOR))
    assert not (folder / name / "step_000002").exists()
    after = [train(model), train(model)]
    saved = state.complete()
    assert saved is not None and saved.step == 2 and (saved.num_bytes > 0) == layout.is_main
    parallel.destroy_groups()
    return after


def second_run(folder: Path, name: str, sources: dict[str, list[dict[str, float]]]) -> None:
    layout = parallel.initialize(LAYOUTS[name][0], seed=0)
    for source, after in sources.items():
        model, _ = state_of(folder, name, layout)
        train(model)  # leaves other weights and moments
        reader = TrainState(folder / source, {"policy": model}, layout, CheckpointConfig(keep_last=9))
        assert reader.load_latest() == Progress(2, CURSOR)
        TrainState(folder / f"{source} by {name}", {"policy": model}, layout, CheckpointConfig()).save(
            Progress(2, CURSOR)
        )
        same_tensors(folder / source, folder / f"{source} by {name}")
        again = [train(model), train(model)]
        if source == name:
            assert again == after, f"{name}: {again} != {after}"
        else:
            for found, wanted in zip(again, after, strict=True):
                assert found.keys() == wanted.keys()
                for metric, value in wanted.items():
                    assert abs(found[metric] - value) <= 2e-2 * max(1.0, abs(value)), (name, source, metric)
    parallel.destroy_groups()


def same_tensors(ours: Path, theirs: Path) -> None:
    """Megatron's own reader finds the same tensors in both, bit for bit."""
    first, second = (dist_checkpointing.load_plain_tensors(str(p / "step_000002" / "policy")) for p in (ours, theirs))
    tensors = {name: value for name, value in first.items() if isinstance(value, Tensor)}
    assert {"decoder.layers.mlp.linear_fc1.weight", "optimizer.state.exp_avg.embedding.word_embeddings.weight"} <= set(
        tensors
    )
    assert tensors.keys() == {name for name, value in second.items() if isinstance(value, Tensor)}
    for name, value in tensors.items():
        assert torch.equal(value, second[name]), f"{name} of {ours.name} and {theirs.name}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
