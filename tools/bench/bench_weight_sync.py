"""Measures each weight transport into a real SGLang server, beside a plain transfer of the same bytes.

    python tools/bench/bench_weight_sync.py --rounds 5

The benchmark pushes a whole random model (1 GiB in bfloat16, on the CPU; it never generates). The plain transfers of
each round are, for `distributed`, a gloo broadcast of each tensor in place to another process's tensor of the same
size; for `tensor`, a copy in memory; for `disk`, a written file. Ratios are to the plain transfer of the same round;
100 % means equal speed.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import click
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's module path lacks the checkout's root

from examples.tiny_model import tiny_config, write_random_model
from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.servers.fleet import open_servers
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.engines.sglang.weights.disk import DiskTransport
from megatron_oreal.engines.sglang.weights.distributed import DistributedTransport
from megatron_oreal.engines.sglang.weights.shared_memory import TensorTransport
from megatron_oreal.engines.sglang.weights.transport import ServerTransport
from megatron_oreal.parallel.rendezvous import listening_store

Weights = dict[str, Tensor]
TIMEOUT = timedelta(seconds=300)
KINDS = ("distributed", "tensor", "disk")


def make_model(path: Path, num_layers: int) -> Weights:
    """Makes a wide model with few tokens: nearly all bytes are in the layers, 128 MiB each."""
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_key_value_heads": 16}
    config = tiny_config(
        vocab_size=1024, num_hidden_layers=num_layers, tie_word_embeddings=False, dtype="bfloat16", **shape
    )
    torch.set_default_dtype(torch.bfloat16)
    write_random_model(path, config, seed=0)
    torch.set_default_dtype(torch.float32)
    return load_file(path / "model.safetensors")


def receive(port: int, sizes: list[int], num_rounds: int) -> None:
    group = join(dist.TCPStore("127.0.0.1", port, 2, False, TIMEOUT), 1)
    weights = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for _ in range(num_rounds):
        broadcast(group, weights)


def broadcast(group: dist.ProcessGroupGloo, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        group.broadcast([tensor], broadcast_options()).wait()


def join(store: dist.Store, rank: int) -> dist.ProcessGroupGloo:
    return dist.ProcessGroupGloo(store, rank, 2, TIMEOUT)


def broadcast_options() -> dist.distributed_c10d.BroadcastOptions:
    options = dist.distributed_c10d.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options


@contextmanager
def plain_broadcast(weights: Weights, num_rounds: int) -> Iterator[Callable[[], None]]:
    store = listening_store("127.0.0.1", 0, 2, TIMEOUT)
    arguments = (store.port, [tensor.nbytes for tensor in weights.values()], num_rounds)
    receiver = multiprocessing.get_context("spawn").Process(target=receive, args=arguments, daemon=True)
    receiver.start()
    group = join(store, 0)
    yield lambda: broadcast(group, (tensor.view(-1).view(torch.uint8) for tensor in weights.values()))
    receiver.join()


def plain_copy(weights: Weights, out: Weights) -> None:
    for name, tensor in weights.items():
        out[name].copy_(tensor)


def plain_write(weights: Weights, path: Path) -> None:
    with path.open("wb") as file:
        for tensor in weights.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def seconds_of(action: Callable[[], object]) -> float:
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


@click.command()
@click.option("--rounds", default=5)
@click.option("--layers", default=8, help="128 MiB each.")
@click.option("--bucket-mib", default=[32], multiple=True, help="rollout.sglang.bucket_bytes; may be repeated.")
@click.option("--transport", type=click.Choice(KINDS), default=KINDS, multiple=True, help="May be repeated.")
@click.option("--python", type=click.Path(path_type=Path), default=SglangConfig().python, help="Of the servers.")
@click.option("--folder", type=click.Path(path_type=Path), help="On the disk to measure; default: the temporary one.")
def main(
    rounds: int, layers: int, bucket_mib: list[int], transport: list[str], python: Path, folder: Path | None
) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        weights = make_model(root / "model", layers)
        loop = EventLoopThread("bench")
        config = SglangConfig(python=python)
        settings = ServerSettings(config, root / "model", "bfloat16", root, "cpu", 64)
        with open_servers(settings, click.echo) as fleet:
            clients = [SglangClient(endpoint) for endpoint in fleet.endpoints]
            for each in bucket_mib:
                bench_buckets(each * 2**20, rounds, transport, weights, root, clients, loop)
            for client in clients:
                loop.run(client.close())
        loop.close()


def bench_buckets(
    bucket_bytes: int,
    rounds: int,
    kinds: list[str],
    weights: Weights,
    root: Path,
    clients: list[SglangClient],
    loop: EventLoopThread,
) -> None:
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    click.echo(f"{num_bytes / 2**30:.2f} GiB, buckets of {bucket_bytes / 2**20:g} MiB, torch {torch.__version__}")
    seconds = TIMEOUT.total_seconds()
    with plain_broadcast(weights, rounds + 1) as send_plainly:
        transports: dict[str, tuple[ServerTransport, Callable[[], None]]] = {
            "distributed": (DistributedTransport(loop, seconds, bucket_bytes, torch.device("cpu")), send_plainly),
            "tensor": (TensorTransport(loop, seconds, bucket_bytes, lambda _: [0]), copier(weights)),
            "disk": (
                DiskTransport(loop, seconds, root / "weights", root / "model", True),
                lambda: plain_write(weights, root / "plain"),
            ),
        }
        measure(rounds, {kind: transports[kind] for kind in kinds}, weights, clients)
    for transport, _ in transports.values():
        transport.close()


def copier(weights: Weights) -> Callable[[], None]:
    out = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    return lambda: plain_copy(weights, out)


def measure(
    rounds: int,
    transports: dict[str, tuple[ServerTransport, Callable[[], None]]],
    weights: Weights,
    clients: list[SglangClient],
) -> None:
    ratios: dict[str, list[float]] = {}
    speeds: dict[str, list[float]] = {}
    version = 0
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    for round_number in range(rounds + 1):
        for name, (transport, plain) in transports.items():
            version += 1
            plain_seconds = seconds_of(plain)
            seconds = seconds_of(partial(transport.push, weights.items(), version, clients))
            speed = num_bytes / 1e9 / seconds
            first = " (the first: it connects)" if round_number == 0 else ""
            click.echo(
                f"round {round_number}, {name}: {seconds:.2f} s, {speed:.2f} GB/s, "
                f"{plain_seconds / seconds:.0%} of the plain transfer's {plain_seconds:.2f} s{first}"
            )
            if round_number > 0:
                ratios.setdefault(name, []).append(plain_seconds / seconds)
                speeds.setdefault(name, []).append(speed)
    for name, values in ratios.items():
        low, high = min(values), max(values)
        click.echo(
            f"{name}: median {statistics.median(speeds[name]):.2f} GB/s, {statistics.median(values):.0%} of the plain "
            f"transfer ({low:.0%} to {high:.0%})"
        )


if __name__ == "__main__":
    main()
