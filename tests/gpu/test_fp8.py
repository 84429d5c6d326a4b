"""FP8 products on CUDA, through each backend and each kind of scales that this machine has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.fp8 import Fp8Gemms, Fp8Options
from megatron_oreal.kernels.gemms import Precision

pytestmark = pytest.mark.gpu
TOKENS, VOCABULARY, HIDDEN = 515, 4096, 512  # an odd number of tokens, as packing leaves it
EVERY_OPTION = [
    Fp8Options("torch", "tensor"),
    Fp8Options("torch", "row"),
    Fp8Options("transformer_engine", "tensor"),
    Fp8Options("transformer_engine", "block"),
    Fp8Options("transformer_engine", "mx"),
]


def make_gemms(options: Fp8Options) -> Fp8Gemms:
    try:
        return Fp8Gemms(torch.device("cuda"), torch.bfloat16, with_values=True, options=options)
    except ValueError as missing:
        pytest.skip(str(missing))


def make_inputs(vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, device="cuda", generator=generator)
    weight = 0.1 * torch.randn(vocabulary, HIDDEN, device="cuda", generator=generator)
    gradient = torch.softmax(hidden @ weight.T, 1)
    gradient[torch.arange(TOKENS, device="cuda"), gradient.argmax(1)] -= 1
    return hidden.bfloat16(), weight.bfloat16(), (gradient / TOKENS).bfloat16()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("options", EVERY_OPTION, ids=lambda options: f"{options.backend}-{options.scaling}")
def test_products_against_float64(options: Fp8Options) -> None:
    gemms = make_gemms(options)
    hidden, weight, gradient = make_inputs()
    exact = hidden.double() @ weight.double().T
    logits = gemms.logits(hidden, weight)
    assert logits.shape == exact.shape and logits.dtype == torch.float32
    assert relative_error(logits, exact) < 0.04
    torch.testing.assert_close(logits.amax(1).double(), exact.amax(1), rtol=1e-4, atol=1e-3)  # computed again
    grad_hidden = torch.empty(TOKENS, HIDDEN, device="cuda")
    gemms.grad_hidden(gradient, weight, grad_hidden, accumulate=False)
    assert relative_error(grad_hidden, gradient.double() @ weight.double()) < 0.05
    for dtype in (torch.float32, torch.bfloat16):
        grad_weight = torch.ones(VOCABULARY, HIDDEN, device="cuda", dtype=dtype)
        gemms.grad_weight(gradient, hidden, grad_weight, accumulate=False)
        once = grad_weight.clone()
        assert relative_error(once, gradient.double().T @ hidden.double()) < 0.05
        gemms.grad_weight(gradient, hidden, grad_weight, accumulate=True)
        torch.testing.assert_close(grad_weight, 2 * once, rtol=1e-2, atol=0)


@pytest.mark.parametrize("options", EVERY_OPTION[:2], ids=lambda options: options.scaling)
def test_a_vocabulary_that_is_no_multiple_of_sixteen(options: Fp8Options) -> None:
    gemms = make_gemms(options)
    hidden, weight, gradient = make_inputs(vocabulary=1037)
    assert relative_error(gemms.logits(hidden, weight), hidden.double() @ weight.double().T) < 0.04
    out = torch.empty(TOKENS, HIDDEN, device="cuda")
    gemms.grad_hidden(gradient, weight, out, accumulate=False)
    assert relative_error(out, gradient.double() @ weight.double()) < 0.05


@pytest.mark.parametrize("options", EVERY_OPTION, ids=lambda options: f"{options.backend}-{options.scaling}")
def test_the_same_inputs_give_the_same_bits(options: Fp8Options) -> None:
    hidden, weight, gradient = make_inputs()
    results = []
    for _ in range(2):
        gemms, out = make_gemms(options), torch.empty(VOCABULARY, HIDDEN, device="cuda")
        gemms.grad_weight(gradient, hidden, out, accumulate=False)
        results.append((gemms.logits(hidden, weight), out))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_a_loss_in_fp8() -> None:
    """The values of fp8_grad are those of bf16, bit by bit; gradients are within 5 %."""
    make_gemms(Fp8Options())
    hidden, weight, _ = make_inputs()
    target = (hidden.float() @ weight.float().T).argmax(1)
    results = {}
    precisions: tuple[Precision, ...] = ("bf16", "fp8_grad", "fp8")
    for precision in precisions:
        inputs = [hidden.requires_grad_(), weight.requires_grad_()]
        logprobs = linear_logprob(*inputs, target, precision=precision)[0]
        results[precision] = (logprobs.detach(), *torch.autograd.grad(logprobs.sum(), inputs))
    assert torch.equal(results["fp8_grad"][0], results["bf16"][0])
    torch.testing.assert_close(results["fp8"][0], results["bf16"][0], rtol=0, atol=0.05)
    for precision in precisions[1:]:
        for found, wanted in zip(results[precision][1:], results["bf16"][1:], strict=True):
            assert relative_error(found, wanted) < 0.06
