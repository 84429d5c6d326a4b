"""Log-probs within kept tokens against autograd of the dense formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import kept_logprob as kernel
from megatron_oreal.kernels.kept_logprob import KeptTokens, Vocabulary, choose_kept, kept_logprob
from megatron_oreal.kernels.products import Products

T, H, V, VALID = 7, 5, 13, 11


def top_three(logits: Tensor) -> Tensor:
    return logits.masked_fill(logits < logits.topk(3).values[:, -1:], -torch.inf)


@pytest.mark.parametrize("block_bytes", [1, 2**26])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_the_dense_formula(
    block_bytes: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "BLOCK_BYTES", block_bytes)  # One row at a time, or all.
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    target, scales = torch.randint(VALID, (T,)), torch.randn(2, T)
    vocabulary = Vocabulary(Products(torch.float32), temperature, VALID)
    kept = choose_kept(hidden, weight, target, vocabulary, top_three)
    logits = (hidden @ weight.T)[:, :VALID] / temperature
    mask = (top_three(logits) > -torch.inf).scatter(1, target[:, None], True)
    assert kept.counts.tolist() == mask.sum(1).tolist() and torch.equal(kept.mask(slice(0, T), VALID), mask)

    inside = logits.masked_fill(~mask, -1e30).log_softmax(1)
    dense = inside.gather(1, target[:, None])[:, 0], -(inside.exp() * inside).sum(1)
    found = kept_logprob(hidden, weight, target, kept, vocabulary)
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other)
    expected = torch.autograd.grad(sum((scales[i] * dense[i]).sum() for i in (0, 1)), (hidden, weight))  # type: ignore[arg-type]
    gradients = torch.autograd.grad(sum((scales[i] * found[i]).sum() for i in (0, 1)), (hidden, weight))  # type: ignore[arg-type]
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not gradients[1][VALID:].any()


def test_no_row_and_a_single_token() -> None:
    vocabulary = Vocabulary(Products(torch.float32), 1.0, V)
    weight = torch.randn(V, H, requires_grad=True)
    nothing = torch.zeros(0, H), torch.zeros(0, dtype=torch.int64)
    kept = choose_kept(nothing[0], weight, nothing[1], vocabulary, top_three)
    logprobs, entropy = kept_logprob(nothing[0], weight, nothing[1], kept, vocabulary)
    (logprobs.sum() + entropy.sum()).backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None and not weight.grad.any()
    alone = KeptTokens(torch.tensor([1]), torch.tensor([4], dtype=torch.int32))
    logprobs, entropy = kept_logprob(torch.randn(1, H), weight, torch.tensor([4]), alone, vocabulary)
    assert logprobs.tolist() == entropy.tolist() == [0.0]
