"""Compares the Triton sampler, on CUDA or with TRITON_INTERPRET=1, with the definition that sorts the vocabulary."""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import Tensor

from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.engines.local.token_sampling import truncate
from megatron_oreal.kernels.triton_sampling import sample_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IS_INTERPRETED = not torch.cuda.is_available()
NUM_DRAWS = 2 if IS_INTERPRETED else 997  # the interpreter needs half a second per draw
FEW = [
    SamplingParams(0.6, 1.0, 0),
    SamplingParams(1.0, 0.9, 0),
    SamplingParams(1.7, 0.8, 5),
]  # temperature, top_p, top_k
MANY = [SamplingParams(*numbers) for numbers in product((1.0, 0.6, 1.7), (1.0, 0.9, 0.35, 1e-9), (0, 1, 5, 40))]
TIES = [SamplingParams(1.0, top_p, top_k) for top_p, top_k in ((1.0, 3), (0.5, 0), (0.95, 7))]
MANY_TIES = [SamplingParams(1.0, *numbers) for numbers in product((1.0, 0.95, 0.7, 0.5, 0.2), range(10))]


def main() -> None:
    for params in FEW if IS_INTERPRETED else MANY:
        check(random_logits(1100 if params.top_k else 100), params)  # of more than one block, and of one
    ties = torch.tensor([2.0, 1.0, 2.0, 1.0, 1.0, 0.0, -0.0, 0.0, 1.0, -3.0])
    for params in TIES if IS_INTERPRETED else MANY_TIES:
        check(ties, params)
    if not IS_INTERPRETED:
        for params in FEW:
            check(random_logits(151_936), params)
    check(-40 + random_logits(300), SamplingParams(1.0, 0.8, 0))
    check_special_values()
    print("passed")


def random_logits(size: int) -> Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(size))


def sample(rows: Tensor, uniform: Tensor, params: SamplingParams) -> tuple[Tensor, ...]:
    results = sample_rows(rows.to(DEVICE), uniform.to(DEVICE), params.temperature, params.top_k, params.top_p)
    return tuple(result.cpu() for result in results)


def check(logits: Tensor, params: SamplingParams) -> None:
    """Checks that evenly spaced numbers draw each kept token in its share, and no other token."""
    wanted = truncate(logits[None] / params.temperature, params.top_k, params.top_p)[0].double().softmax(0)
    uniform = (torch.arange(NUM_DRAWS, dtype=torch.float64) + 0.37) / NUM_DRAWS
    rows = logits.expand(NUM_DRAWS, -1).contiguous()
    token_ids, rollout, model = sample(rows, uniform, params)
    cumulated = wanted.cumsum(0)
    expected = torch.searchsorted(cumulated, uniform, right=True)
    # A number within rounding error of the border between two tokens may give either one.
    near = (cumulated[expected.clamp_max(len(wanted) - 1)] - uniform).abs() < 1e-5
    near |= (torch.cat([cumulated.new_zeros(1), cumulated])[expected] - uniform).abs() < 1e-5
    assert torch.equal(token_ids[~near], expected[~near]), params
    assert near.float().mean() <= 0.5 and bool((wanted[token_ids] > 0).all()), params
    torch.testing.assert_close(rollout.double(), wanted[token_ids].log(), atol=2e-5, rtol=0)
    torch.testing.assert_close(model, logits.log_softmax(0)[token_ids], atol=2e-5, rtol=0)


def check_special_values() -> None:
    rows = torch.tensor([[math.nan, 0.0, 1.0], [math.inf, 0.0, 1.0], [-math.inf] * 3, [0.0, -math.inf, 0.0]])
    for params in (SamplingParams(), SamplingParams(1.0, 0.8, 0)):
        uniform = torch.full((4,), 0.999, dtype=torch.float64)
        token_ids, rollout, model = sample(rows, uniform, params)
        assert token_ids.min() >= 0 and token_ids.max() < 3
        assert model.isfinite().tolist() == rollout.isfinite().tolist() == [False, False, False, True], (model, rollout)
        assert token_ids[3] != 1


if __name__ == "__main__":
    main()
