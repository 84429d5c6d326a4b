"""FP8 gradients on CUDA, through each backend and each kind of scales that this machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.fp8.scaled import E4M3, Fp8Options, scaled_product
from megatron_oreal.kernels.precision import Arithmetic, make_arithmetic
from megatron_oreal.kernels.reference import linear_logprob_reference

pytestmark = pytest.mark.gpu
TOKENS, VOCABULARY, HIDDEN = 515, 4096, 512  # an odd number of tokens, as packing leaves it
EVERY_OPTION = [
    Fp8Options("torch"),
    Fp8Options("transformer_engine", "tensor"),
    Fp8Options("transformer_engine", "block"),
    Fp8Options("transformer_engine", "mx"),
]
ids = {"ids": lambda options: f"{options.backend}-{options.scaling}"}


def make_fp8(options: Fp8Options) -> Arithmetic:
    try:
        return make_arithmetic("fp8_grad", torch.device("cuda"), torch.bfloat16, options)
    except ValueError as missing:
        pytest.skip(str(missing))


def make_inputs(vocabulary: int = VOCABULARY, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, HIDDEN, device="cuda", generator=generator).bfloat16()
    weight = (0.1 * torch.randn(vocabulary, HIDDEN, device="cuda", generator=generator)).bfloat16()
    return hidden, weight, torch.randint(0, vocabulary - 7, (tokens,), device="cuda", generator=generator)


def gradients(hidden: Tensor, weight: Tensor, target: Tensor, mode: str = "recompute", **options: Any) -> list[Tensor]:
    """Log-probs and gradients of a policy loss with advantages."""
    inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    scale = torch.randn(len(target), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    if mode == "eager":
        options |= {"mode": mode, "token_scale": scale}
    kernel: Any = linear_logprob_reference if hidden.dtype is torch.float64 else linear_logprob
    logprobs = kernel(*inputs, target, **options)[0]
    return [logprobs.detach(), *torch.autograd.grad((scale * logprobs).sum(), inputs)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("options", EVERY_OPTION, **ids)
@pytest.mark.parametrize("mode", ["recompute", "eager"])
def test_gradients_against_float64(options: Fp8Options, mode: str) -> None:
    """Within 5 %; the log-probs are those of bf16, bit by bit. Whether blocks are kept or not."""
    inputs = make_inputs()
    wanted = gradients(inputs[0].double(), inputs[1].double(), inputs[2], temperature=0.8, valid_vocab=VOCABULARY - 5)
    plain = gradients(*inputs, mode=mode, temperature=0.8, valid_vocab=VOCABULARY - 5)
    for num_bytes in (2**30, 2**20):
        found = gradients(
            *inputs,
            mode=mode,
            temperature=0.8,
            valid_vocab=VOCABULARY - 5,
            precision=make_fp8(options),
            memory_bytes=num_bytes,
        )
        torch.testing.assert_close(found[0], plain[0], rtol=0, atol=1e-5)
        for mine, exact in zip(found[1:], wanted[1:], strict=True):
            assert relative_error(mine, exact) < 0.05
        assert found[2][VOCABULARY - 5 :].eq(0).all()


@pytest.mark.parametrize(("vocabulary", "tokens"), [(1037, 515), (4096, 1), (50, 33)])
def test_sizes_that_are_no_multiples_of_sixteen(vocabulary: int, tokens: int) -> None:
    inputs = make_inputs(vocabulary, tokens)
    found = gradients(*inputs, precision=make_fp8(Fp8Options()))
    wanted = gradients(inputs[0].double(), inputs[1].double(), inputs[2])
    for mine, exact in zip(found[1:], wanted[1:], strict=True):
        assert relative_error(mine, exact) < 0.05


@pytest.mark.parametrize("options", EVERY_OPTION, **ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_in_main_grad(options: Fp8Options, dtype: torch.dtype) -> None:
    hidden, weight, target = make_inputs()
    leaf = torch.nn.Parameter(weight)
    leaf.main_grad = torch.zeros_like(weight, dtype=dtype)  # type: ignore[attr-defined]
    arithmetic = make_fp8(options)
    for _ in range(2):
        linear_logprob(hidden, leaf, target, accumulate_main_grad=True, precision=arithmetic)[0].sum().backward()
    exact = weight.double().requires_grad_()
    (2 * linear_logprob_reference(hidden.double(), exact, target)[0].sum()).backward()
    assert exact.grad is not None and leaf.grad is None
    assert relative_error(leaf.main_grad, exact.grad) < 0.05  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", EVERY_OPTION, **ids)
def test_the_same_inputs_give_the_same_bits(options: Fp8Options) -> None:
    inputs = make_inputs()
    first, second = (gradients(*inputs, precision=make_fp8(options)) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


def test_rows_of_a_wider_matrix_are_multiplied_where_they_are() -> None:
    make_fp8(Fp8Options())
    generator = torch.Generator("cuda").manual_seed(0)
    left = torch.randn(528, 2048, device="cuda", generator=generator).to(E4M3)[:, 256:768]
    right = torch.randn(256, 512, device="cuda", generator=generator).to(E4M3)
    product = scaled_product(left, right, torch.tensor(0.5, device="cuda"), torch.float32)
    # Hopper sums FP8 products with 14 bits, 128 at a time: no bound relative to a sum that cancels would hold.
    assert relative_error(product, 0.5 * left.double() @ right.double().T) < 2e-3


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(8192, 152064), (65536, 19008), (2048, 152064)])
def test_peak_memory(mode: str, num_tokens: int, num_columns: int) -> None:
    """Beyond inputs and gradients at most 1.5 GiB, quantised weights included."""
    make_fp8(Fp8Options())
    generator = torch.Generator("cuda").manual_seed(0)
    weight = (0.04 * torch.randn(num_columns, 5120, device="cuda", generator=generator)).bfloat16()
    hidden = torch.randn(num_tokens, 5120, device="cuda", generator=generator).bfloat16()
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    target = torch.randint(0, num_columns, (num_tokens,), device="cuda", generator=generator)
    options: dict[str, Any] = {"token_scale": torch.ones(num_tokens, device="cuda")} if mode == "eager" else {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _, entropy = linear_logprob(*inputs, target, entropy=True, precision="fp8_grad", mode=mode, **options)  # type: ignore[arg-type]
    loss = logprobs.sum() if mode == "eager" else logprobs.sum() + entropy.sum()  # type: ignore[union-attr]
    gradients = torch.autograd.grad(loss, inputs)
    extra = torch.cuda.max_memory_allocated() - before
    gradient_bytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    assert extra - gradient_bytes <= 1.5 * 2**30
