"""Measures the weight stream (a live model -> whole Hugging Face tensors) beside an all-gather of the same bytes.

    python tools/bench/bench_export.py --rounds 5

Two processes over gloo hold random weights of Qwen2.5-1.5B's shapes, with fewer layers, in bfloat16: split by tensor
parallelism, then by pipeline stages. In each round, the stream and an all-gather (half of the bytes from each process,
in buckets of the same size, one flat tensor each) run one after the other, so that a busy machine slows both; ratios
are within a round. Seconds are those of the slower process; GB are 10^9 bytes of the whole model.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.weights.families import Architecture, parameters, read_architecture
from megatron_oreal.weights.mapping import pad_rows, padded_vocabulary, rows_of_rank
from megatron_oreal.weights.stream import WeightStream

QWEN2_1_5B = {
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LAYOUTS = {"TP2": (2, 1), "PP2": (1, 2)}  # tensor, pipeline


@dataclass(frozen=True, slots=True)
class Layout:
    tensor_rank: int
    tensor_size: int
    tensor_group: dist.ProcessGroup
    pipeline_rank: int
    pipeline_size: int
    pipeline_group: dist.ProcessGroup


def shards(architecture: Architecture, layout: Layout) -> list[tuple[str, Tensor]]:
    """Returns this rank's parameters by Megatron's names."""
    rank, size = layout.tensor_rank, layout.tensor_size
    padded_rows = padded_vocabulary(architecture.vocab_size, size)
    layers_on_stage = architecture.num_layers // layout.pipeline_size
    found = []
    for row, place in parameters(architecture, "lm"):
        stage = 0 if row.pads_vocabulary else layout.pipeline_size - 1  # stage of the parameters outside of the layers
        if place.layer is not None:
            stage = place.layer // layers_on_stage
        if row.exported and stage == layout.pipeline_rank:
            whole = torch.randn(row.shape, dtype=torch.bfloat16)
            if row.pads_vocabulary:
                part = pad_rows(whole[rows_of_rank(len(whole), padded_rows, rank, size)], padded_rows // size)
            else:
                part = row.op.shard(whole, rank, size)
            found.append((row.megatron_name(place), part.clone()))
    return found


def plain_all_gather(num_bytes: int, bucket_bytes: int) -> None:
    own = torch.zeros(num_bytes // 2, dtype=torch.uint8)
    for part in own.split(bucket_bytes // 2):
        dist.all_gather_into_tensor(torch.empty(2 * len(part), dtype=torch.uint8), part)


def timed(work: Callable[[], object]) -> float:
    """Returns the seconds until both processes have finished."""
    dist.barrier()
    begin = time.monotonic()
    work()
    dist.barrier()
    return time.monotonic() - begin


def measure(folder: Path, rounds: int, bucket_bytes: int) -> None:
    architecture, rank = read_architecture(folder), dist.get_rank()
    groups = [dist.new_group([number]) for number in range(2)]
    for name, (tensor, pipeline) in LAYOUTS.items():
        both, alone = dist.group.WORLD, groups[rank]
        layout = Layout(
            tensor_rank=rank % tensor,
            tensor_size=tensor,
            tensor_group=both if tensor > 1 else alone,
            pipeline_rank=rank % pipeline,
            pipeline_size=pipeline,
            pipeline_group=both if pipeline > 1 else alone,
        )
        stream = WeightStream(shards(architecture, layout), architecture, "lm", layout, bucket_bytes)
        num_bytes = sum(tensor.nbytes for _, tensor in stream)  # also warms up
        plain_all_gather(num_bytes, bucket_bytes)
        ratios, rates = [], []
        for _ in range(rounds):
            streamed = timed(lambda: [None for _ in stream])  # noqa: B023  # called immediately
            gathered = timed(lambda: plain_all_gather(num_bytes, bucket_bytes))  # noqa: B023
            ratios.append(gathered / streamed)
            rates.append((num_bytes / 1e9 / streamed, num_bytes / 1e9 / gathered))
            if rank == 0:
                click.echo(f"{name}: stream {rates[-1][0]:.2f} GB/s, all-gather {rates[-1][1]:.2f} GB/s")
        if rank == 0:
            stream_rate, gather_rate = (statistics.median(column) for column in zip(*rates, strict=True))
            click.echo(
                f"{name}, {num_bytes / 1e9:.2f} GB: median {stream_rate:.2f} GB/s, of a plain all-gather "
                f"{gather_rate:.2f} GB/s; ratio in a round {statistics.median(ratios):.0%}"
            )


def worker(rank: int, port: int, folder: Path, rounds: int, bucket_bytes: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measure(folder, rounds, bucket_bytes)
    dist.destroy_process_group()


@click.command()
@click.option("--rounds", default=5)
@click.option("--layers", default=4, help="A multiple of 2.")
@click.option("--bucket-mib", default=32)
def main(rounds: int, layers: int, bucket_mib: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(QWEN2_1_5B | {"num_hidden_layers": layers}))
        click.echo(f"two processes, buckets of {bucket_mib} MiB, gloo, torch {torch.__version__}")
        torch.multiprocessing.spawn(worker, (port, Path(name), rounds, bucket_mib * 2**20), nprocs=2)


if __name__ == "__main__":
    main()
