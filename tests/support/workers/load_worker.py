"""Loads converted checkpoints with megatron-core in every layout, and compares every tensor; torchrun runs this file.

It also compares the tensors of our own loader, and those of the weight stream.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.models import parallel
from megatron_oreal.models.build import build_chunks, global_parameters, transformer_config
from megatron_oreal.models.heads import LogprobHead, ScalarHead
from megatron_oreal.weights.families import Architecture, HeadKind, canonical_name, parameter_rows, read_architecture
from megatron_oreal.weights.hf_directory import HfReader
from megatron_oreal.weights.initial import load_parameters
from megatron_oreal.weights.mapping import find_row, pad_rows, slice_along
from megatron_oreal.weights.stream import WeightStream
from tests.conversion.test_conversion import tensors_of

# (tensor, pipeline, expert)
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2)]
BUCKET_BYTES = 16_384  # several buckets per model


def main(folder: Path, names: list[str]) -> None:
    for tensor, pipeline, expert in LAYOUTS:
        layout = parallel.initialize(ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=tensor > 1), seed=0)
        if expert > 1:
            parallel.destroy_groups()
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tensor,
                pipeline_model_parallel_size=pipeline,
                expert_model_parallel_size=expert,
                create_gloo_process_groups=False,
            )
            layout = replace(
                layout,
                tensor_group=parallel_state.get_tensor_model_parallel_group(),
                pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
            )
        for name in names:
            if expert == 1 or "moe" in name:
                check(folder, name, layout, expert)
        parallel.destroy_groups()
        if dist.get_rank() == 0:
            print(f"TP{tensor} PP{pipeline} EP{expert} loaded", flush=True)
    print(f"rank {dist.get_rank()} passed", flush=True)
    dist.destroy_process_group()


def check(folder: Path, name: str, layout: parallel.ParallelLayout, expert_size: int) -> None:
    hf, mcore = folder / name, folder / f"{name}-mcore" / "release"
    architecture = read_architecture(hf)
    head: Any = ScalarHead(layout) if "scalar" in name else LogprobHead(layout, architecture.vocab_size)
    config = transformer_config(architecture, ModelConfig(path=hf, dtype="bfloat16"), layout, False)
    config = replace(config, expert_model_parallel_size=expert_size)
    (chunk,) = build_chunks(architecture, head, config, layout, transformer_engine=False)
    fill(chunk, float("nan"))
    common = dist_checkpointing.load_common_state_dict(str(mcore))
    metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = chunk.sharded_state_dict(metadata=metadata)
    loaded = dist_checkpointing.load({"model": sharded}, str(mcore))  # default strictness: no missing tensor
    chunk.load_state_dict(loaded["model"], strict=False)
    if (layout.tensor_size, layout.pipeline_size) == (2, 2):
        save(folder / f"{name}-saved", chunk)
    assert_loaded(chunk, architecture, head.kind, hf, layout, expert_size)
    group = parallel_state.get_expert_model_parallel_group() if expert_size > 1 else None
    stream = WeightStream(list(global_parameters([chunk])), architecture, head.kind, layout, BUCKET_BYTES, group)
    check_stream(stream, tensors_of(hf))
    if expert_size > 1:  # the trainer has no expert parallelism
        return
    # Our own loader reads the converted checkpoint and the one that Megatron saved from four ranks.
    saved = [folder / f"{name}-saved"] if (folder / f"{name}-saved").is_dir() and head.kind == "lm" else []
    for path in (hf, folder / f"{name}-mcore", *saved):
        fill(chunk, float("nan"))
        load_parameters(global_parameters([chunk]), path, architecture, head.kind, layout)
        assert_loaded(chunk, architecture, head.kind, hf, layout, expert_size)


def check_stream(stream: WeightStream, expected: dict[str, Tensor]) -> None:
    """Checks that the stream yields each whole tensor once."""
    names = []
    for name, tensor in stream:
        names.append(name)
        assert torch.equal(tensor, expected[name]), name
    assert sorted(names) == sorted(expected)


def fill(chunk: Any, value: float) -> None:
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.fill_(value)


def assert_loaded(
    chunk: Any, architecture: Architecture, head: HeadKind, hf: Path, layout: parallel.ParallelLayout, expert_size: int
) -> None:
    rows, reader = parameter_rows(architecture, head), HfReader(hf)
    for megatron_name, parameter in global_parameters([chunk]):
        row, place = find_row(rows, canonical_name(megatron_name))
        if place.expert is not None:
            local = architecture.num_experts // expert_size
            place = replace(place, expert=place.expert + local * parallel_state.get_expert_model_parallel_rank())
        tensors = [reader.read(hf_name, None, 0, 1) for hf_name in row.hf_names(place)]
        expected = row.op.merge([shard(tensor, row, layout, len(parameter)) for tensor in tensors])
        assert torch.equal(parameter, expected), f"{hf}: {megatron_name}, {layout}"


def save(path: Path, chunk: Any) -> None:
    """Saves a checkpoint as Megatron-LM does at its fifth iteration."""
    if dist.get_rank() == 0:
        (path / "iter_0000005").mkdir(parents=True)
        (path / "latest_checkpointed_iteration.txt").write_text("5")
    dist.barrier()
    filesystem_async._process_memory = lambda: 0  # Megatron logs this number, which it gets from psutil
    state = {"model": chunk.sharded_state_dict(), "iteration": 5, "checkpoint_version": 3.0}
    dist_checkpointing.save(state, str(path / "iter_0000005"))


def shard(tensor: Tensor, row: Any, layout: parallel.ParallelLayout, local_rows: int) -> Tensor:
    if row.pads_vocabulary:
        tensor = pad_rows(tensor, local_rows * layout.tensor_size)
    return slice_along(tensor, row.op.axis, layout.tensor_rank, layout.tensor_size)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
