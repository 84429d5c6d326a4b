"""Pushes weights, as a trainer in separate processes, to the servers of an endpoints file.

python -m tests.support.workers.weights_worker die TRANSPORT ENDPOINTS MODEL FOLDER   killed in the middle of a push
torchrun -m tests.support.workers.weights_worker layouts NUM_SENDERS ENDPOINTS MODEL FOLDER  all layouts, all transports
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from transformers import Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.endpoints import read_endpoints
from megatron_oreal.engines.sglang.weights.requests import WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import ServerTransport, clients_of_rank
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import read_architecture
from megatron_oreal.weights.fingerprint import MeasuredStream
from tests.support.weight_checks import check_outputs, noisy_weights, open_transport, signalling_stream

LAYOUTS = {"TP1": ParallelConfig(), "TP2": ParallelConfig(tensor=2), "PP2": ParallelConfig(pipeline=2)}


def die(transport: str, clients: list[SglangClient], loop: EventLoopThread, model: Path, folder: Path) -> None:
    weights = noisy_weights(model, seed=99)
    stream = signalling_stream(weights, len(weights) - 2, [os.getpid()], signal.SIGKILL)
    open_transport(transport, loop, model, folder).push(stream, 99, clients)


def layouts(num_senders: int, clients: list[SglangClient], loop: EventLoopThread, model: Path, folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    version = 100
    for name, config in LAYOUTS.items():
        layout = parallel.initialize(config, seed=0)
        mine = clients_of_rank(clients, layout.rank, num_senders)
        for kind in ("disk", "distributed", "tensor"):
            version += 1
            weights = noisy_weights(model, seed=version)
            policy = load_policy(write_model(folder / f"{version}", model, version, layout), layout)
            transport = open_transport(kind, loop, model, folder, layout.rank)
            measured = MeasuredStream(policy.weight_stream())
            transport.push(measured, version, mine)
            assert measured.num_bytes == sum(tensor.nbytes for tensor in weights.values())
            for client in mine:
                check_outputs(loop, client, model, weights, version)
            dist.barrier()
            check_common_failure(transport, policy, mine, loop)
            transport.close()
        parallel.destroy_groups()
        print(f"rank {dist.get_rank()}: {name} passed", flush=True)
    loop.run(close(clients))
    dist.destroy_process_group()


def check_common_failure(
    transport: ServerTransport, policy: TrainableModel, mine: list[SglangClient], loop: EventLoopThread
) -> None:
    """Checks that all ranks raise one sender's error, after all have consumed the stream."""
    wrong = [SglangClient(replace(client.endpoint, admin_key="wrong")) for client in mine]
    try:
        transport.push(policy.weight_stream(), 7, wrong)
    except WeightSyncError as error:
        assert str(error).startswith("weights of version 7: ") and "was answered 401" in str(error), error
        assert error.urls
    else:
        raise AssertionError("a server took weights for a wrong key")
    loop.run(close(wrong))


async def close(clients: list[SglangClient]) -> None:
    for client in clients:
        await client.close()


def write_model(path: Path, model: Path, seed: int, layout: ParallelLayout) -> Path:
    if layout.is_main:
        changed = Qwen2ForCausalLM.from_pretrained(model)
        changed.load_state_dict(noisy_weights(model, seed))
        changed.save_pretrained(path)
    dist.barrier()
    return path


def load_policy(path: Path, layout: ParallelLayout) -> TrainableModel:
    architecture = read_architecture(path)
    head = LogprobHead(layout, architecture.vocab_size)
    policy = TrainableModel("policy", architecture, head, ModelConfig(path=path, dtype="float32"), layout)
    policy.load_weights(path)
    return policy


def main(command: str, choice: str, endpoints: Path, model: Path, folder: Path) -> None:
    loop = EventLoopThread("weights")
    clients = [SglangClient(endpoint) for endpoint in read_endpoints(endpoints)]
    if command == "die":
        die(choice, clients, loop, model, folder)
    else:
        layouts(int(choice), clients, loop, model, folder)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(Path, sys.argv[3:]))
