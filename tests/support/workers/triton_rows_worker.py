"""Compares the Triton row kernels with float64, alone and inside linear_logprob; TRITON_INTERPRET=1 uses a CPU."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.kernels import blocks, tiles, torch_rows, triton_rows
from megatron_oreal.kernels.block_passes import HalfPrecisionGradients
from megatron_oreal.kernels.fp8.gradients import bounds_of
from megatron_oreal.kernels.linear_logprob import linear_logprob
from megatron_oreal.kernels.precision import Arithmetic
from megatron_oreal.kernels.products import Products
from megatron_oreal.kernels.reference import linear_logprob_reference
from megatron_oreal.kernels.torch_rows import SHIFT_COLUMNS, Exponentials
from megatron_oreal.kernels.vocabulary_reduction import Upstream

SHAPES = ((1, 1, 1), (5, 37, 37), (4, 200, 131), (3, 5000, 4096), (2, 9001, 8999))  # tokens, columns, valid columns
MODULE = importlib.import_module("megatron_oreal.kernels.linear_logprob")


def main() -> None:
    for number, shape in enumerate(SHAPES):  # the interpreter is slow: every pair of the three, not every triple
        temperatures = (1.0, 0.7) if number % 2 == 0 else (0.7, 1.0)
        for temperature, with_entropy in zip(temperatures, (True, False), strict=True):
            check(*shape, temperature, with_entropy)
            check_kept(*shape, temperature, with_entropy)
    check_cast_transpose()
    check_special_values()
    check_inside_linear_logprob()
    check_blocks_inside_linear_logprob()
    print("passed")


def make(num_tokens: int, num_columns: int, num_valid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_columns)
    # The rows belong to a wider buffer, so that the stride is not the width.
    logits = torch.empty(num_tokens, num_columns + 3)[:, :num_columns]
    logits.copy_(5 * torch.randn(num_tokens, num_columns, generator=generator))
    target = torch.randint(0, num_valid, (num_tokens,), generator=generator)
    if num_tokens > 2:
        target[:3] = torch.tensor([-1, num_valid, num_valid - 1])  # two targets belong to another tile
    return logits, target


def check(num_tokens: int, num_columns: int, num_valid: int, temperature: float, with_entropy: bool) -> None:
    logits, target = make(num_tokens, num_columns, num_valid)
    exact = logits[:, :num_valid].double() / temperature
    maximum = exact.amax(1)
    shifted = exact - maximum[:, None]
    here = (target >= 0) & (target < num_valid)
    target_logit = torch.where(here, exact.gather(1, (target * here)[:, None])[:, 0], -torch.inf)
    wanted = [maximum, shifted.exp().sum(1), target_logit, (shifted.exp() * shifted).sum(1)]
    numbers = triton_rows.reduce_rows(logits, target, num_valid, temperature, with_entropy)
    close(numbers, torch.stack(wanted[: 4 if with_entropy else 3]), 1e-5)

    logsumexp = exact.logsumexp(1)
    probs = (exact - logsumexp[:, None]).exp()
    entropy = logsumexp - (probs * exact).sum(1)
    scales = torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(0))
    gradient = torch.zeros(num_tokens, num_columns, dtype=torch.float64)
    gradient[:, :num_valid] = probs * scales[1, :, None]
    if with_entropy:
        gradient[:, :num_valid] -= probs * (exact - logsumexp[:, None] + entropy[:, None]) * scales[2, :, None]
    gradient.scatter_add_(1, (target * here)[:, None], (scales[0] * here)[:, None].double())
    for dtype, tolerance in (
        (torch.float32, 1e-5),
        (torch.bfloat16, 2**-7),
    ):  # interpreted, bf16 is cut off and not rounded
        given = logits.clone()
        found = triton_rows.gradient_rows(
            given,
            target,
            num_valid,
            temperature,
            logsumexp.float(),
            entropy.float() if with_entropy else None,
            scales,
            dtype,
        )
        assert found.dtype is dtype and (found is given) == (dtype is torch.float32)
        close(found, gradient, tolerance)


def check_kept(num_tokens: int, num_columns: int, num_valid: int, temperature: float, with_entropy: bool) -> None:
    """Compares kept exponentials, and their gradients in half precision and FP8, with torch_rows."""
    logits, target = make(num_tokens, num_columns, num_valid)
    tiles_of = []
    for rows in (triton_rows, torch_rows):
        # These are parts of wider buffers, so that the strides are not the widths.
        values = torch.full((num_tokens, num_columns + 5), -1.0, dtype=torch.bfloat16)
        shifts = torch.empty(num_tokens, 2 + Exponentials.num_shifts(num_columns))
        kept = Exponentials(values[:, :num_columns], shifts[:, 2:])
        numbers = rows.reduce_rows(logits.clone(), target, num_valid, temperature, with_entropy, kept)
        close(numbers, rows.reduce_rows(logits, target, num_valid, temperature, with_entropy).double(), 1e-6)
        assert values[:, num_columns:].eq(-1).all()
        tiles_of.append(kept)
    close(tiles_of[0].shifts, tiles_of[1].shifts.double(), 1e-6)
    close(tiles_of[0].values, tiles_of[1].values.double(), 2**-7)  # interpreted, bf16 is cut off and not rounded

    exact = logits[:, :num_valid].double() / temperature
    logsumexp = exact.logsumexp(1)
    entropy = (logsumexp - (exact.softmax(1) * exact).sum(1)).float() if with_entropy else None
    scales = torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(0))
    given = target, num_valid, logsumexp.float(), entropy, scales
    kept = tiles_of[1]
    wanted = torch.empty(num_tokens, num_columns, dtype=torch.bfloat16)
    torch_rows.gradient_of_kept(kept, *given, wanted)
    bounds = bounds_of(Upstream(target, logsumexp.float(), entropy, scales))
    assert (wanted.abs().amax(1) <= 1.01 * bounds).all()
    stored = num_tokens + -num_tokens % 16, num_columns + -num_columns % 16
    # The values before rounding to e4m3, because the interpreter rounds to e4m3 wrongly: it loses the carry.
    results = []
    for rows in (triton_rows, torch_rows):
        found, transposed = torch.full(stored, torch.nan), torch.full(stored[::-1], torch.nan)
        rows.fp8_gradient_of_kept(kept, *given, bounds, found, transposed)
        assert torch.equal(found.T, transposed) and found.abs().max() <= 448.1
        results.append(found)
    close(results[0], results[1].double(), 1e-4)
    triton_rows.gradient_of_kept(kept, *given, kept.values)  # in place
    close(kept.values, wanted.double(), 2**-7)


def check_cast_transpose() -> None:
    generator = torch.Generator().manual_seed(0)
    for num_rows, num_columns in ((1, 1), (130, 70), (257, 64)):
        matrix = torch.randn(num_rows, num_columns + 3, generator=generator).bfloat16()[:, :num_columns]
        factors = torch.rand(num_rows, generator=generator)
        for given in (None, factors):
            product = matrix.float() * (1.0 if given is None else factors[:, None])
            scale = product.abs().amax() / 448
            stored = num_columns + -num_columns % 16, num_rows + -num_rows % 16
            out = torch.full(stored, torch.nan)
            triton_rows.cast_transpose(matrix, given, scale, out)
            close(out, torch_rows.padded((product / scale).T, *stored).double(), 1e-5)


def check_special_values() -> None:
    """Checks that sums show NaN and infinities, and that extreme logits do not overflow, as in torch_rows."""
    logits, target = make(5, 5000, 5000)
    logits *= 2000  # up to 4e4
    logits[1, 4500], logits[2, 3] = torch.nan, torch.inf
    ours, theirs = (
        rows.reduce_rows(logits.clone(), target, 5000, 1.0, with_entropy=True) for rows in (triton_rows, torch_rows)
    )
    assert ours[1].isnan().tolist() == theirs[1].isnan().tolist() == [False, True, True, False, False]
    finite = torch.tensor([0, 3, 4])
    close(ours[:, finite], theirs[:, finite].double(), 1e-5)


def check_inside_linear_logprob() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(37, 16, generator=generator), torch.randn(203, 16, generator=generator)
    target = torch.randint(0, 190, (37,), generator=generator)
    MODULE.row_kernels = lambda _device_type: triton_rows
    tiles.CPU_BYTES = 20_000  # several tiles
    results = []
    for kernel, dtype in ((linear_logprob, torch.float32), (linear_logprob_reference, torch.float64)):
        inputs = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        options = {"entropy": True} if kernel is linear_logprob else {}
        outputs = kernel(*inputs, target, temperature=0.8, valid_vocab=190, **options)  # type: ignore[operator]
        loss = sum(((number + 1) * output).sum() for number, output in enumerate(outputs))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, 1e-5)


def check_blocks_inside_linear_logprob() -> None:
    """Checks the passes over blocks, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    num_columns = SHIFT_COLUMNS + 203
    hidden = torch.randn(137, 16, generator=generator).bfloat16()
    weight = torch.randn(num_columns, 16, generator=generator).bfloat16()
    target = torch.randint(0, num_columns - 13, (137,), generator=generator)
    MODULE.row_kernels = lambda _device_type: triton_rows
    blocks.TILE_BYTES = 2**21
    products = Products(torch.float32)
    half = Arithmetic(products, lambda: HalfPrecisionGradients(products, torch.bfloat16))
    wanted = gradients(linear_logprob_reference, hidden.double(), weight.double(), target)
    found = gradients(linear_logprob, hidden, weight, target, precision=half, entropy=True)
    for mine, exact in zip(found, wanted, strict=True):
        error = float((mine.double() - exact).norm() / exact.norm())
        assert error <= 1e-2, f"off by {error:.1e}"  # interpreted, bf16 is cut off and not rounded


def gradients(kernel: Any, hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    outputs = kernel(*inputs, target, temperature=0.8, valid_vocab=len(weight) - 13, **options)
    return torch.autograd.grad(sum(((number + 1) * output).sum() for number, output in enumerate(outputs)), inputs)


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite)
    scale = wanted[finite].abs().clamp_min(1.0)
    error = ((found.double()[finite] - wanted[finite]).abs() / scale).max()
    assert error <= tolerance, f"off by {error:.2e}, more than {tolerance:.0e}"


if __name__ == "__main__":
    main()
