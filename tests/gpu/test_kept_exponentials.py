"""The Triton kernels of the passes over blocks, against torch_rows on the same GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import torch_rows
from megatron_oreal.kernels.fp8.gradients import bounds_of
from megatron_oreal.kernels.fp8.scaled import E4M3, aligned
from megatron_oreal.kernels.torch_rows import Exponentials
from megatron_oreal.kernels.vocabulary_reduction import Upstream

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 1), (37, 200, 131), (129, 8448, 8448), (515, 9001, 8999)]  # tokens, columns, valid columns
STEP = 2**-3  # of e4m3, relative


def make_logits(num_tokens: int, num_columns: int, num_valid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(num_columns)
    logits = 5 * torch.randn(num_tokens, num_columns, device="cuda", generator=generator)
    target = torch.randint(0, num_valid, (num_tokens,), device="cuda", generator=generator)
    if num_tokens > 2:
        target[0], target[1] = -1, num_valid  # another tile's
    return logits, target


def make_kept(num_tokens: int, num_columns: int) -> Exponentials:
    """Parts of wider memory, as in a block."""
    width = num_columns + -num_columns % 64
    values = torch.full((num_tokens, width), -1.0, dtype=torch.bfloat16, device="cuda")
    shifts = torch.empty(num_tokens, 2 + Exponentials.num_shifts(num_columns), device="cuda")
    return Exponentials(values[:, :num_columns], shifts[:, 2:])


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_they_agree_with_torch_rows(shape: tuple[int, int, int], with_entropy: bool) -> None:
    triton_rows: Any = pytest.importorskip("megatron_oreal.kernels.triton_rows")
    num_tokens, num_columns, num_valid = shape
    logits, target = make_logits(*shape)
    kept, wanted_kept = make_kept(num_tokens, num_columns), make_kept(num_tokens, num_columns)
    numbers = triton_rows.reduce_rows(logits, target, num_valid, 0.7, with_entropy, kept)
    wanted = torch_rows.reduce_rows(logits.clone(), target, num_valid, 0.7, with_entropy, wanted_kept)
    torch.testing.assert_close(numbers, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept.shifts, wanted_kept.shifts, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept.values, wanted_kept.values, rtol=2**-7, atol=1e-30)
    assert kept.values[:, num_valid:].eq(0).all()

    logsumexp = numbers[0] + numbers[1].log()
    entropy = numbers[1].log() - numbers[3] / numbers[1] if with_entropy else None
    scales = torch.randn(3, num_tokens, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    given = target, num_valid, logsumexp, entropy, scales
    gradient = torch.empty(num_tokens, num_columns, dtype=torch.bfloat16, device="cuda")
    torch_rows.gradient_of_kept(kept, *given, gradient)
    check_fp8(triton_rows, kept, given, gradient)
    triton_rows.gradient_of_kept(kept, *given, kept.values)  # in place
    torch.testing.assert_close(kept.values, gradient, rtol=2**-6, atol=1e-7)


def check_fp8(triton_rows: Any, kept: Exponentials, given: tuple[Any, ...], gradient: Tensor) -> None:
    """A step of e4m3 apart at most from the gradient itself; transposed, the same bits."""
    target, _, logsumexp, entropy, scales = given
    num_tokens, num_columns = gradient.shape
    bounds = bounds_of(Upstream(target, logsumexp, entropy, scales))
    assert (gradient.abs().amax(1) <= 1.01 * bounds).all()
    out = torch.full((aligned(num_tokens), aligned(num_columns)), 1.0, device="cuda").to(E4M3)
    transposed = torch.full((aligned(num_columns), aligned(num_tokens)), 1.0, device="cuda").to(E4M3)
    triton_rows.fp8_gradient_of_kept(kept, *given, bounds, out, transposed)
    assert torch.equal(out.float().T, transposed.float())
    wanted = torch_rows.padded(gradient.float() * (448 / bounds)[:, None], *out.shape)
    assert ((out.float() - wanted).abs() <= STEP / 2 * wanted.abs() * 1.1 + 2**-9).all()


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (130, 70), (515, 5120)])
@pytest.mark.parametrize("with_factors", [True, False])
def test_cast_transpose(num_rows: int, num_columns: int, with_factors: bool) -> None:
    triton_rows: Any = pytest.importorskip("megatron_oreal.kernels.triton_rows")
    generator = torch.Generator("cuda").manual_seed(0)
    matrix = torch.randn(num_rows, num_columns, device="cuda", generator=generator).bfloat16()
    factors = torch.rand(num_rows, device="cuda", generator=generator) if with_factors else None
    product = matrix.float() * (1.0 if factors is None else factors[:, None])
    scale = product.abs().amax() / 448
    out = torch.full((aligned(num_columns), aligned(num_rows)), 1.0, device="cuda").to(E4M3)
    triton_rows.cast_transpose(matrix, factors, scale, out)
    wanted = torch_rows.padded((product / scale).T, *out.shape)
    assert ((out.float() - wanted).abs() <= STEP / 2 * wanted.abs() * 1.001 + 2**-10).all()


def test_the_gradients_end_below_the_exponentials() -> None:
    """e4m3 in the memory of a bfloat16 block: the first tile from a copy, the others in place, as if apart."""
    triton_rows: Any = pytest.importorskip("megatron_oreal.kernels.triton_rows")
    logits, target = make_logits(257, 1024, 1024)
    memory = torch.empty(272, 1024, dtype=torch.bfloat16, device="cuda")
    columns = [slice(start, start + 256) for start in range(0, 1024, 256)]
    logsumexp, scales = logits.logsumexp(1), torch.randn(3, 257, device="cuda")
    bounds = bounds_of(Upstream(target, logsumexp, None, scales))
    kept, apart = [], torch.empty(272, 1024, device="cuda").to(E4M3)
    for part in columns:
        tile = Exponentials(memory[:257, part], torch.empty(257, 1, device="cuda"))
        triton_rows.reduce_rows(logits[:, part], target - part.start, 256, 1.0, False, tile)
        kept.append(tile)
    inside = memory.view(E4M3)[:, :1024]
    for out in (apart, inside):
        for part, tile in zip(columns, kept, strict=True):
            source = Exponentials(tile.values.clone(), tile.shifts) if part.start == 0 else tile
            transposed = torch.empty(256, 272, device="cuda").to(E4M3)
            given = target - part.start, 256, logsumexp, None, scales, bounds
            triton_rows.fp8_gradient_of_kept(source, *given, out[:, part], transposed)
    assert torch.equal(apart.float(), inside.float())
