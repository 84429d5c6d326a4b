"""Log-probs within kept tokens on CUDA, in half precision, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels.kept_logprob import Vocabulary, choose_kept, kept_logprob
from megatron_oreal.kernels.precision import make_arithmetic

pytestmark = pytest.mark.gpu


def top_fifty(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits < logits.topk(50).values[:, -1:], -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(600, 64, device="cuda", dtype=dtype, requires_grad=True)
    weight = (0.4 * torch.randn(40009, 64, device="cuda")).to(dtype).requires_grad_()
    target, scales = torch.randint(40000, (600,), device="cuda"), torch.linspace(-1, 1, 600, device="cuda")
    vocabulary = Vocabulary(make_arithmetic("bf16", hidden.device, dtype).products, 0.8, 40000)
    kept = choose_kept(hidden, weight, target, vocabulary, top_fifty)
    logprobs, entropy = kept_logprob(hidden, weight, target, kept, vocabulary)
    gradients = torch.autograd.grad((scales * (logprobs + 0.1 * entropy)).sum(), (hidden, weight))

    exact = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = (exact[0] @ exact[1].T)[:, :40000] / 0.8
    inside = logits.masked_fill(~kept.mask(slice(0, 600), 40000), -1e30).log_softmax(1)
    expected = inside.gather(1, target[:, None])[:, 0], -(inside.exp() * inside).sum(1)
    torch.testing.assert_close((logprobs.double(), entropy.double()), expected, rtol=1e-3, atol=1e-3)
    exact_gradients = torch.autograd.grad((scales * (expected[0] + 0.1 * expected[1])).sum(), exact)
    for found, one in zip(gradients, exact_gradients, strict=True):
        assert (found.double() - one).norm() < 1e-2 * one.norm()
