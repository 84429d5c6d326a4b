"""Random numbers, truncation and draws, against hand-computed values."""

import math

import pytest
import torch

from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.engines.local.token_sampling import (
    GOLDEN_GAMMA,
    as_int64,
    draw,
    invert_cdf,
    seed_tensor,
    splitmix64,
    truncate,
    uniforms,
)

CPU = torch.device("cpu")
MASK = 2**64 - 1


def splitmix64_of_int(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def test_splitmix64_gives_the_published_sequence() -> None:
    states = torch.tensor([as_int64(1234567 + step * GOLDEN_GAMMA) for step in (1, 2, 3)])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(states).tolist() == [as_int64(value) for value in expected]


def test_uniforms_equal_integer_arithmetic_for_any_seed() -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 1, 123456789123456789, 2**70 + 5]
    for position in (0, 1, 35, 100_000):
        gamma = 0x9E3779B97F4A7C15
        expected = [
            (splitmix64_of_int((splitmix64_of_int(seed & MASK) + (position + 1) * gamma) & MASK) >> 11) * 2.0**-53
            for seed in seeds
        ]
        assert uniforms(seed_tensor(seeds, CPU), position).tolist() == expected


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    rows = torch.stack([uniforms(torch.arange(20_000), position) for position in (0, 1, 2)])
    assert rows.min() >= 0 and rows.max() < 1
    # Four standard errors.
    assert (rows.mean(dim=1) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / 20_000)
    correlation = torch.corrcoef(torch.cat((rows, rows[:1].roll(1, dims=1))))
    assert (correlation - torch.eye(4)).abs().max() < 4 / math.sqrt(20_000)


@pytest.mark.gpu
def test_uniforms_and_draws_are_the_same_on_cuda() -> None:
    seeds = torch.arange(4096) * as_int64(0xDEADBEEFDEADBEEF)
    assert torch.equal(uniforms(seeds, 17), uniforms(seeds.cuda(), 17).cpu())
    uniform, probabilities = uniforms(seeds, 3), torch.rand(4096, 1000).softmax(dim=-1)
    assert torch.equal(invert_cdf(probabilities, uniform), invert_cdf(probabilities.cuda(), uniform.cuda()).cpu())


def test_invert_cdf_at_its_borders() -> None:
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(5, 5)
    uniform = torch.tensor([0.0, 0.25 - 2**-40, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert invert_cdf(probabilities, uniform).tolist() == [1, 1, 3, 3, 3]


def test_invert_cdf_with_sums_off_one() -> None:
    probabilities = torch.tensor([[0.5, 0.4999, 0.0], [0.5, 0.5001, 0.0]])
    uniform = torch.full((2,), 1 - 2**-53, dtype=torch.float64)
    assert invert_cdf(probabilities, uniform).tolist() == [1, 1]


def kept(logits: torch.Tensor, top_k: int = 0, top_p: float = 1.0) -> list[list[int]]:
    truncated = truncate(logits, top_k, top_p)
    assert torch.equal(truncated[truncated.isfinite()], logits[truncated.isfinite()])
    return [row.isfinite().nonzero()[:, 0].tolist() for row in truncated]


def test_truncate_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.25, 0.25, 0.25, 0.25]]).log()
    assert kept(logits) == [[0, 1, 2, 3]] * 2
    assert kept(logits, top_k=2) == [[1, 3], [0, 1]]  # ties go to the lower ids
    assert kept(logits, top_k=9) == [[0, 1, 2, 3]] * 2
    assert kept(logits, top_p=0.4) == [[1], [0, 1]]
    assert kept(logits, top_p=0.7) == [[1, 3], [0, 1, 2]]
    assert kept(logits, top_p=1e-9) == [[1], [0]]
    # After top_k the masses are 2/3 and 1/3.
    assert kept(logits[:1], top_k=2, top_p=0.6) == [[1]]
    assert kept(logits[:1], top_k=2, top_p=0.7) == [[1, 3]]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=0.7), SamplingParams(temperature=1.3, top_k=4, top_p=0.8)],
)
def test_frequencies_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.tensor([1.0, -0.5, 2.0, 0.3, 0.0, -2.0, 1.5])
    num_draws = 20_000
    draws = draw(logits.expand(num_draws, -1), torch.arange(num_draws), 5, params)
    probabilities = truncate(logits[None] / params.temperature, params.top_k, params.top_p)[0].softmax(dim=-1)
    counts, expected = draws.token_ids.bincount(minlength=7), num_draws * probabilities
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    assert chi_square < 22.5  # 0.999 quantile at 6 degrees of freedom
    assert torch.allclose(draws.rollout_logprobs, probabilities[draws.token_ids].log(), atol=1e-5)
    assert torch.allclose(draws.model_logprobs, logits.log_softmax(dim=-1)[draws.token_ids], atol=1e-5)
    assert draws.rollout_logprobs.dtype == draws.model_logprobs.dtype == torch.float32


def test_greedy_is_a_point_mass() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    draws = draw(logits, torch.tensor([3]), 0, SamplingParams(temperature=0))
    assert draws.token_ids.tolist() == [1]
    assert draws.rollout_logprobs.tolist() == [0.0]
    assert torch.allclose(draws.model_logprobs, logits.log_softmax(dim=-1)[:, 1])


def test_logits_that_are_not_finite_show_in_the_logprobs() -> None:
    draws = draw(torch.tensor([[math.nan, 0.0], [0.0, 0.0]]), torch.tensor([1, 2]), 0, SamplingParams())
    assert draws.model_logprobs.isfinite().tolist() == [False, True]
    assert draws.token_ids.min() >= 0 and draws.token_ids.max() < 2


@pytest.mark.parametrize(
    ("field", "value"), [("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("max_new_tokens", 0)]
)
def test_sampling_params_name_the_wrong_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"rollout.{field}"):
        SamplingParams(**{field: value})
