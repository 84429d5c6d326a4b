"""How much memory the stream of a live model takes; load_worker.py checks what comes out of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_oreal.weights.families import parameters, read_architecture
from megatron_oreal.weights.stream import WeightStream
from tests.support.tiny_checkpoints import hf_shapes, write_checkpoint


@dataclass(frozen=True)
class FirstRank:
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_size: int
    pipeline_group: dist.ProcessGroup
    tensor_rank: int = 0
    pipeline_rank: int = 0


@pytest.fixture
def groups() -> Iterator[dict[int, dist.ProcessGroup]]:
    """torch's own stand-in for the other rank: what is gathered has its size, and nothing is allocated by a backend."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield {1: dist.new_group([0]), 2: dist.new_group([0, 1])}
    dist.destroy_process_group()


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("bucket_bytes", [1, 20_000, 60_000])
def test_memory_is_two_buckets_and_two_tensors(
    tmp_path: Path, groups: dict[int, dist.ProcessGroup], tensor: int, pipeline: int, bucket_bytes: int
) -> None:
    hf = write_checkpoint(tmp_path / "hf", "qwen2", num_hidden_layers=8)
    architecture, layout = read_architecture(hf), FirstRank(tensor, groups[tensor], pipeline, groups[pipeline])
    rows = [(row, place) for row, place in parameters(architecture, "lm") if (place.layer or 0) < 8 // pipeline]
    shards = [
        (row.megatron_name(place), row.op.shard(torch.empty(row.shape), 0, tensor).contiguous()) for row, place in rows
    ]
    largest_parameter = max(torch.Size(row.shape).numel() * 4 for row, _ in rows)
    largest_tensor = max(torch.Size(shape).numel() * 4 for shape in hf_shapes(hf).values())
    stream = WeightStream(shards, architecture, "lm", layout, bucket_bytes)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        num_bytes = sum(weight.nbytes for _, weight in stream)
    bucket = max(bucket_bytes, largest_parameter)
    peak = peak_bytes(profiler)
    assert bucket < peak <= 2 * bucket + 2 * largest_tensor
    assert peak < num_bytes / 2 or bucket_bytes > 50_000


def peak_bytes(profiler: profile) -> int:
    """Of what was allocated meanwhile."""
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
