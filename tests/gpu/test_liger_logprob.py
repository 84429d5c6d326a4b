"""Liger's operator against float64, alone and as the head of a model; skipped where its packages are missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels.liger_logprob import LigerCall, LigerOperator, missing_for_liger
from megatron_oreal.kernels.reference import linear_logprob_reference
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model

pytestmark = pytest.mark.gpu
LARGEST = LigerCall(max_tokens=4096, hidden_size=1536, num_columns=40064)


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    missing = missing_for_liger(torch.device("cuda"), torch.bfloat16, 0)
    if missing:
        pytest.skip(missing)
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=False)
    parallel.finalize()


@pytest.fixture(scope="module")
def operator(layout: ParallelLayout) -> LigerOperator:
    return LigerOperator(LARGEST, layout.tensor_group)


def make(num_tokens: int, num_columns: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(num_tokens)
    hidden = torch.randn(num_tokens, width, device="cuda", generator=generator).bfloat16()
    weight = (3 / width**0.5 * torch.randn(num_columns, width, device="cuda", generator=generator)).bfloat16()
    return hidden, weight, torch.randint(0, num_columns, (num_tokens,), device="cuda", generator=generator)


def gradients(outputs: tuple[Tensor, Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Through log-probs and entropies, each token with a factor of its own."""
    scale = torch.linspace(-1, 1, len(outputs[0]), device="cuda", dtype=outputs[0].dtype)
    return torch.autograd.grad((scale * (2 * outputs[0] + 0.1 * outputs[1])).sum(), inputs)


@pytest.mark.parametrize("shape", [(1, 64, 64), (257, 1032, 136), (300, 40009, 64), (4096, 40064, 1536)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_accuracy(shape: tuple[int, int, int], temperature: float, operator: LigerOperator) -> None:
    """Its logits are less exact than ours: outputs are off by up to 6e-4 of the largest logit."""
    hidden, weight, target = make(*shape)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    exact_inputs = [each.detach().double().requires_grad_() for each in inputs]
    found = operator(*inputs, target, temperature)
    exact = linear_logprob_reference(*exact_inputs, target, temperature=temperature)
    exact_outputs = (exact[0], exact[2])
    tolerance = 1e-3 * float((hidden.double() @ weight.double().T).abs().max() / temperature)
    for value, wanted in zip(found, exact_outputs, strict=True):
        assert value.dtype is torch.float32
        assert float((value - wanted).abs().max()) <= tolerance
    for gradient, wanted in zip(gradients(found, inputs), gradients(exact_outputs, exact_inputs), strict=True):
        assert gradient.dtype is torch.bfloat16
        assert float((gradient - wanted).norm() / wanted.norm()) <= 1e-2


def test_a_call_does_not_wait_for_the_gpu(operator: LigerOperator) -> None:
    hidden, weight, target = make(512, 1024, 256)
    operator(hidden, weight, target, 1.0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        operator(hidden, weight, target, 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_has_the_log_probs_of_our_own_kernels(
    tmp_path: Path, layout: ParallelLayout, operator: LigerOperator
) -> None:
    path = write_tiny_model(tmp_path, tied=False, num_layers=1)
    architecture = read_architecture(path)
    found = []
    for backend in ("own", "liger"):
        head = LogprobHead(layout, architecture.vocab_size, backend=backend, max_tokens=64, temperature=0.8)  # type: ignore[arg-type]
        model = TrainableModel("policy", architecture, head, ModelConfig(path=path, dtype="bfloat16"), layout)
        model.load_weights(path)
        batch = pack(random_sequences(6), PackingPlan(0, 1, microbatch_tokens=64, device=layout.device))
        model.forward(batch, "old_logprobs")
        found.append(torch.cat([microbatch.old_logprobs for microbatch in batch.microbatches]))
    torch.testing.assert_close(found[1], found[0], atol=5e-3, rtol=0)
