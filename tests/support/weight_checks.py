"""Provides what the tests of weight transports share with their worker processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.weights.disk import DiskTransport
from megatron_oreal.engines.sglang.weights.distributed import DistributedTransport
from megatron_oreal.engines.sglang.weights.shared_memory import TensorTransport
from megatron_oreal.engines.sglang.weights.transport import ServerTransport

Weights = dict[str, Tensor]
PROMPT = [5, 6, 7, 8]
NUM_TOKENS = 8
BUCKET_BYTES = 20_000  # several buckets for the tiny model


def noisy_weights(model: Path, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    stored = load_file(model / "model.safetensors")
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in stored.items()}


def open_transport(
    kind: str, loop: EventLoopThread, model: Path, folder: Path, rank: int = 0, timeout_seconds: float = 60
) -> ServerTransport:
    if kind == "disk":
        return DiskTransport(loop, timeout_seconds, folder / "weights", model, rank == 0, check_weights=True)
    if kind == "distributed":
        return DistributedTransport(loop, timeout_seconds, BUCKET_BYTES, torch.device("cpu"), check_weights=True)
    return TensorTransport(loop, timeout_seconds, BUCKET_BYTES, lambda _: [rank], check_weights=True)


def check_outputs(loop: EventLoopThread, client: SglangClient, model: Path, weights: Weights, version: int) -> None:
    """Checks that the server's greedy tokens and log-probs equal those of transformers with these weights."""
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True},
        "return_logprob": True,
    }
    answer = loop.run(client.generate(body, 60))
    tokens, logprobs = greedy(model, weights)
    assert answer["output_ids"] == tokens
    found = torch.tensor([each[0] for each in answer["meta_info"]["output_token_logprobs"]])
    assert (found - logprobs).abs().max() < 1e-4
    assert answer["meta_info"]["weight_version"] == str(version)


@torch.no_grad()
def greedy(path: Path, weights: Weights) -> tuple[list[int], Tensor]:
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.load_state_dict(weights)
    ids, logprobs = list(PROMPT), []
    for _ in range(NUM_TOKENS):
        logprob, token = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
        ids.append(int(token))
        logprobs.append(float(logprob))
    return ids[len(PROMPT) :], torch.tensor(logprobs)


def signalling_stream(weights: Weights, after: int, pids: Sequence[int], number: int) -> Iterator[tuple[str, Tensor]]:
    """Yields tensors, and signals the processes after the consumer has taken `after` of them."""
    for index, item in enumerate(weights.items()):
        if index == after:
            for pid in pids:
                os.kill(pid, number)
        yield item
