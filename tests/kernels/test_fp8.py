"""What FP8 gradients are made of, by hand; their accuracy over whole calls is in test_blocks.py."""

from __future__ import annotations

import pytest
import torch

from megatron_oreal.kernels import torch_rows
from megatron_oreal.kernels.blocks import COLUMN_ALIGNMENT
from megatron_oreal.kernels.fp8 import transformer_engine
from megatron_oreal.kernels.fp8.gradients import bounds_of
from megatron_oreal.kernels.fp8.scaled import E4M3, Fp8Options, aligned, scale_of, scaled_product
from megatron_oreal.kernels.precision import make_arithmetic
from megatron_oreal.kernels.torch_rows import Exponentials
from megatron_oreal.kernels.vocabulary_reduction import Upstream

CPU = torch.device("cpu")


def test_bounds_by_hand() -> None:
    """|p - 1| and |p| at scale -2: 2. Only p, at scale 3: 3. Entropy 0.5 at scale 4: 4 (0.37 + 0.5)."""
    scales = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 3.0, 0.0], [0.0, 0.0, -4.0]])
    entropy = torch.tensor([1.0, 2.0, 0.5])
    upstream = Upstream(torch.zeros(3).long(), torch.zeros(3), entropy, scales)
    assert bounds_of(upstream).tolist() == pytest.approx([2.0, 3.0, 4 * 0.87])
    alone = bounds_of(Upstream(torch.zeros(3).long(), torch.zeros(3), None, scales))
    assert alone.tolist()[:2] == [2.0, 3.0] and 0 < float(alone[2]) < 1e-30


def test_no_gradient_exceeds_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(500, 60, generator=generator)
    target = torch.randint(0, 60, (500,), generator=generator)
    scales = torch.randn(3, 500, generator=generator)
    logsumexp = logits.logsumexp(1)
    entropy = logsumexp - (logits.softmax(1) * logits).sum(1)
    upstream = Upstream(target, logsumexp, entropy, scales)
    gradient = torch_rows.gradient_rows(logits, target, 60, 1.0, logsumexp, entropy, scales, torch.float32)
    shares = gradient.abs().amax(1) / bounds_of(upstream)
    assert float(shares.max()) <= 1 and float(shares.median()) > 0.25


def test_exponentials_by_hand() -> None:
    """Logits 1, 3 and 2 at temperature 1/2, the last one padding: 2, 6 and nothing."""
    kept = Exponentials(torch.empty(1, 3, dtype=torch.bfloat16), torch.empty(1, 1))
    torch_rows.reduce_rows(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0]), 2, 0.5, False, kept)
    assert kept.shifts.tolist() == [[6.0]]
    assert kept.values.float().tolist() == [[pytest.approx(2.718281828**-4, rel=2**-8), 1.0, 0.0]]


def test_both_layouts_by_hand() -> None:
    """p = 1/4 and 3/4 of logits 0 and ln 3; the target is the second: 1/4 and -1/4, of a bound of 1, times 448."""
    kept = Exponentials(torch.tensor([[1 / 3, 1.0]]).bfloat16(), torch.tensor([[3.0]]).log())
    out, transposed = torch.empty(16, 16, dtype=E4M3), torch.empty(16, 16, dtype=E4M3)
    given = torch.tensor([1]), 2, torch.tensor([4.0]).log(), None, torch.tensor([[-1.0], [1.0], [0.0]])
    torch_rows.fp8_gradient_of_kept(kept, *given, torch.ones(1), out, transposed)
    assert out.float()[0, :2].tolist() == [112.0, -112.0]
    assert out.float().abs().sum() == 224 and torch.equal(out.float().T, transposed.float())


def test_casting_by_hand() -> None:
    """3.3 times 448 / 7 = 211.2 is between the e4m3 values 208 and 224."""
    out = torch.empty(16, 16, dtype=E4M3)
    matrix = torch.tensor([[7.0, -3.3], [0.0, 0.5]])
    torch_rows.cast_transpose(matrix, torch.tensor([1.0, 2.0]), scale_of(torch.tensor(7.0)), out)
    assert out.float()[:2, :2].tolist() == [[448.0, 0.0], [-208.0, 64.0]]
    assert out.float().abs().sum() == 448 + 208 + 64
    assert float(scale_of(torch.tensor(0.0))) > 0 and scale_of(torch.tensor(torch.nan)).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_product(dtype: torch.dtype) -> None:
    """Also of rows of a wider matrix, as the gradients in a block's memory are."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(32, 128, generator=generator).to(E4M3)[:, 16:64]
    right = torch.randn(64, 48, generator=generator).to(E4M3)
    wanted = 0.5 * left.float() @ right.float().T
    found = scaled_product(left, right, torch.tensor(0.5), dtype)
    out = torch.empty(32, 64, dtype=dtype)
    scaled_product(left, right, torch.tensor(0.5), dtype, out=out)
    assert torch.equal(found, out)
    torch.testing.assert_close(found.float(), wanted, rtol=2**-7, atol=1e-4)


def test_tiles_suit_every_kind_of_scales() -> None:
    assert all(COLUMN_ALIGNMENT % alignment == 0 for alignment in transformer_engine.ALIGNMENT.values())
    assert COLUMN_ALIGNMENT % aligned(1) == 0


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ("tensor", "needs an NVIDIA GPU of compute capability >= 8.9: use bf16"),
        ("block", "needs an NVIDIA GPU of compute capability >= 9.0: use bf16"),
        ("mx", "needs an NVIDIA GPU of compute capability >= 10.0: use bf16"),
    ],
)
def test_what_is_missing_is_named(scaling: transformer_engine.Scaling, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_arithmetic("fp8_grad", CPU, torch.bfloat16, Fp8Options("transformer_engine", scaling))
    assert "\n" not in str(error.value)
