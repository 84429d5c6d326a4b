"""Run with TRITON_INTERPRET=1: the Triton row kernels on a CPU against float64, alone and inside linear_logprob."""

from __future__ import annotations

import importlib
from itertools import product

import torch
from torch import Tensor

from megatron_oreal.kernels import tiles, torch_rows, triton_rows
from megatron_oreal.kernels.linear_logprob import linear_logprob
from megatron_oreal.kernels.reference import linear_logprob_reference

SHAPES = ((1, 1, 1), (5, 37, 37), (4, 200, 131), (3, 5000, 4096), (2, 9001, 8999))  # tokens, columns, valid columns
MODULE = importlib.import_module("megatron_oreal.kernels.linear_logprob")


def main() -> None:
    for shape, temperature, with_entropy in product(SHAPES, (1.0, 0.7), (True, False)):
        check(*shape, temperature, with_entropy)
    check_special_values()
    check_inside_linear_logprob()
    print("passed")


def make(num_tokens: int, num_columns: int, num_valid: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_columns)
    # Rows of a wider buffer: the stride is not the width.
    logits = torch.empty(num_tokens, num_columns + 3)[:, :num_columns]
    logits.copy_(5 * torch.randn(num_tokens, num_columns, generator=generator))
    target = torch.randint(0, num_valid, (num_tokens,), generator=generator)
    if num_tokens > 2:
        target[:3] = torch.tensor([-1, num_valid, num_valid - 1])  # two are another tile's
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


def check_special_values() -> None:
    """NaN and infinities end in the sums; extreme logits do not overflow. As in the torch path."""
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


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite)
    scale = wanted[finite].abs().clamp_min(1.0)
    error = ((found.double()[finite] - wanted[finite]).abs() / scale).max()
    assert error <= tolerance, f"off by {error:.2e}, more than {tolerance:.0e}"


if __name__ == "__main__":
    main()
