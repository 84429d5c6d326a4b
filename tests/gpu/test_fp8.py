"""FP8 products on CUDA, through each backend and each kind of scales that this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import linear_logprob, tiles
from megatron_oreal.kernels.fp8.gemms import Fp8Gemms
from megatron_oreal.kernels.fp8.scaled import Fp8Options
from megatron_oreal.kernels.gemms import Precision
from megatron_oreal.kernels.precision import make_fp8_gemms

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
        return make_fp8_gemms(torch.device("cuda"), torch.bfloat16, with_values=True, options=options)
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
    largest = exact.argmax(1, keepdim=True)
    again = gemms.exact_logits(hidden, weight, largest)
    assert again is not None
    torch.testing.assert_close(again.double(), exact.gather(1, largest), rtol=1e-4, atol=1e-3)
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


@pytest.mark.parametrize("limit", [2**21, 2**30])
def test_the_largest_logits_of_all_tiles_are_exact(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """Log-prob, logsumexp and entropy, to the 64th largest logit; and no NaN from what is masked meanwhile."""
    make_gemms(Fp8Options())
    monkeypatch.setattr(tiles, "CUDA_BYTES", limit)
    monkeypatch.setattr(tiles, "CUDA_BLOCK_BYTES", limit // 64)
    hidden, weight, _ = make_inputs()
    exact = hidden.double() @ weight.double().T
    target = exact.argmax(1)
    gemms = make_fp8_gemms(torch.device("cuda"), torch.bfloat16, with_values=True)
    logits = gemms.logits(hidden, weight).double()
    columns = logits.topk(gemms.num_exact, dim=1).indices
    logits = logits.scatter(1, columns, exact.gather(1, columns)) / 0.7
    logsumexp = torch.logsumexp(logits, 1)
    entropy = logsumexp - (torch.softmax(logits, 1) * logits).sum(1)
    outputs = linear_logprob(hidden, weight, target, entropy=True, precision=gemms, temperature=0.7)
    wanted = exact.gather(1, target[:, None])[:, 0] / 0.7 - logsumexp, logsumexp, entropy
    for found, value in zip(outputs, wanted, strict=True):
        assert found is not None
        # Of equal logits at the 64th place either may be the exact one.
        torch.testing.assert_close(found.double(), value, rtol=0, atol=5e-3)


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("precision", ["fp8_grad", "fp8"])
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(8192, 152064), (65536, 19008), (2048, 152064)])
def test_peak_memory(mode: str, precision: Precision, num_tokens: int, num_columns: int) -> None:
    """Beyond inputs and gradients at most 1.5 GiB, quantised weights and the search for the largest logits included.

    A half-precision gradient of the weight may be summed in float32: that counts as the gradient here.
    """
    make_gemms(Fp8Options())
    generator = torch.Generator("cuda").manual_seed(0)
    weight = (0.04 * torch.randn(num_columns, 5120, device="cuda", generator=generator)).bfloat16()
    hidden = torch.randn(num_tokens, 5120, device="cuda", generator=generator).bfloat16()
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    target = torch.randint(0, num_columns, (num_tokens,), device="cuda", generator=generator)
    options: dict[str, Any] = {"token_scale": torch.ones(num_tokens, device="cuda")} if mode == "eager" else {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _, entropy = linear_logprob(*inputs, target, entropy=True, precision=precision, mode=mode, **options)  # type: ignore[arg-type]
    loss = logprobs.sum() if mode == "eager" else logprobs.sum() + entropy.sum()  # type: ignore[union-attr]
    gradients = torch.autograd.grad(loss, inputs)
    extra = torch.cuda.max_memory_allocated() - before
    gradient_bytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    assert extra - gradient_bytes <= 1.5 * 2**30
