"""What linear_logprob holds at a time, and that nothing as large as the logits is ever made, with a loss on top."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_oreal.algorithms.ppo import Ppo
from megatron_oreal.config import PpoConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels import blocks, tiles, torch_rows
from megatron_oreal.kernels.fp8 import gradients as fp8_gradients
from megatron_oreal.kernels.linear_logprob import linear_logprob
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.types import TrainingSequence

WIDTH = 16


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operations made and that live at the same time, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak_bytes = 0
        self.largest = 0  # elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, tensor.numel())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak_bytes = max(self.peak_bytes, sum(num_bytes for _, num_bytes in self.live.values()))
        return result


def make(num_tokens: int, num_columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(num_columns, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, num_columns, (num_tokens,), generator=generator)


def measure(num_tokens: int, num_columns: int, dtype: torch.dtype, mode: str, **options: Any) -> tuple[int, int]:
    """(peak bytes beyond inputs and gradients, elements of the largest tensor) of a forward and a backward pass."""
    hidden, weight, target = make(num_tokens, num_columns, dtype)
    if mode == "eager":
        options["token_scale"] = torch.ones(num_tokens)
    with Allocations() as allocations:
        logprobs, logsumexp, entropy = linear_logprob(hidden, weight, target, entropy=True, mode=mode, **options)
        assert entropy is not None
        loss = logprobs.sum() if mode == "eager" else (logprobs + logsumexp + entropy).sum()
        gradients = torch.autograd.grad(loss, [hidden, weight])
    assert all(gradient.any() for gradient in gradients)
    # Both are seen: the inputs because of their slices.
    inputs_and_gradients = 2 * hidden.element_size() * (hidden.numel() + weight.numel())
    return allocations.peak_bytes - inputs_and_gradients, allocations.largest


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_flat_in_tokens_and_vocabulary(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, mode: str
) -> None:
    """Four times as many of either need nothing more, but for a few numbers a token."""
    limit = 800_000
    monkeypatch.setattr(tiles, "CPU_BYTES", limit)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 40_000)
    for num_tokens, num_columns in ((512, 1024), (1536, 1024), (512, 4096)):
        peak, largest = measure(num_tokens, num_columns, dtype, mode)
        assert peak <= limit + 3 * torch_rows.BLOCK_BYTES + 100 * num_tokens
        assert largest <= max(limit // 4, num_columns * WIDTH) < num_tokens * num_columns


@pytest.mark.parametrize("mode", ["recompute", "eager"])
def test_memory_of_blocks_is_within_its_bound(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Blocks, a tile of logits and quantised matrices; and what torch_rows takes in the place of the GPU's kernels.

    In half precision a CPU's products copy a whole block to float32; tests/gpu holds the bound there.
    """
    monkeypatch.setattr(blocks, "TILE_BYTES", 400_000)
    monkeypatch.setattr(fp8_gradients, "WEIGHT_BYTES", 100_000)
    monkeypatch.setattr(fp8_gradients, "SUM_BYTES", 100_000)
    limit = 3_200_000
    for num_tokens, num_columns in ((512, 2048), (1536, 2048), (512, 8192)):
        peak, _ = measure(num_tokens, num_columns, torch.bfloat16, mode, precision="fp8_grad", memory_bytes=limit)
        tile = 128 * 1536 * 4  # at most, and four of its size in torch_rows; products are of float32 copies
        copies = 4 * 128 * num_columns + 4 * num_columns * WIDTH
        assert peak <= limit + 4 * tile + copies + 100 * num_tokens


def test_a_large_vocabulary_stays_below_the_bound_of_a_cpu() -> None:
    """Logits of half a GiB, in a process of its own: its peak is what linear_logprob and the libraries below need."""
    code = """
import resource, torch
from megatron_oreal.kernels import linear_logprob
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(num_tokens, num_columns):
    hidden = torch.zeros(num_tokens, 16).requires_grad_()
    weight = torch.zeros(num_columns, 16).requires_grad_()
    outputs = linear_logprob(hidden, weight, torch.zeros(num_tokens, dtype=torch.int64), entropy=True)
    (outputs[0] + outputs[2]).sum().backward()
run(64, 64)
before = peak()
run(2048, 65536)
print(peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    inputs_and_gradients = 2 * (2048 + 65536) * 16 * 4 / 2**20
    assert float(run.stdout) - inputs_and_gradients <= 200  # MiB


def test_head_and_policy_loss_make_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's clipped loss and entropy bonus over the log-probs of a micro-batch, and back."""
    vocabulary = 3000
    monkeypatch.setattr(tiles, "CPU_BYTES", 200_000)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", 10_000)
    plan = PackingPlan(0, 1, microbatch_tokens=600)
    batch = pack([TrainingSequence([1] * 10, [number] * 190, 1.0, True) for number in range(3)], plan)
    (microbatch,) = batch.microbatches
    num_trained = int(microbatch.loss_mask.sum())
    hidden, weight, _ = make(len(microbatch.labels), vocabulary)
    layout: Any = SimpleNamespace(sequence_parallel=False, tensor_size=1)
    model = SimpleNamespace(
        share_embeddings_and_output_weights=False,
        output_layer=SimpleNamespace(weight=weight),
    )
    ppo = Ppo(PpoConfig(name="ppo", entropy_coef=0.01), plan, 0, None, None, None)  # type: ignore[arg-type]
    with Allocations() as allocations:
        outputs = LogprobHead(layout, vocabulary)(model, hidden[:, None], microbatch)
        ppo.policy_loss(outputs, microbatch, batch).loss.backward()
    assert hidden.grad is not None and weight.grad is not None and weight.grad.any()
    assert num_trained * vocabulary > 4 * allocations.largest
    assert allocations.peak_bytes < num_trained * vocabulary  # a quarter of the float32 logits
