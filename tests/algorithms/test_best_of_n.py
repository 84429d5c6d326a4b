"""Best-of-n and the optimum under a KL penalty, against enumerations and integrals; identities hold to 1e-9."""

import itertools
import math

import numpy as np
import pytest
import torch

from megatron_oreal.algorithms.best_of_n import BestOfN, KlOptimum, kl_divergence, ranked_kl
from megatron_oreal.algorithms.objectives import h_prime, h_value, weights

POLICY, REWARDS = (0.1, 0.25, 0.3, 0.35), (1, 0, 1, 0)  # The chance of each answer, and whether it is correct.
PASS_RATE = 0.4
SIZES = pytest.mark.parametrize("n", [1, 2, 3, 6])


def enumerated(n: int) -> list[float]:
    """The law of the kept answer, over all draws of n: the first correct one, or else the first."""
    law = [0.0] * len(POLICY)
    for draws in itertools.product(range(len(POLICY)), repeat=n):
        kept = next((draw for draw in draws if REWARDS[draw]), draws[0])
        law[kept] += math.prod(POLICY[draw] for draw in draws)
    return law


@SIZES
def test_eq_5_is_the_law_of_the_kept_sample(n: int) -> None:
    law, found = enumerated(n), BestOfN(n, PASS_RATE)
    factors = [found.correct_factor if reward else found.incorrect_factor for reward in REWARDS]
    assert [p * factor for p, factor in zip(POLICY, factors, strict=True)] == pytest.approx(law, abs=1e-9)
    assert found.success == pytest.approx(sum(p for p, reward in zip(law, REWARDS, strict=True) if reward), abs=1e-9)
    assert found.kl == pytest.approx(kl_divergence(law, POLICY), abs=1e-9)


@SIZES
def test_eq_6_has_the_gradient_of_best_of_n(n: int) -> None:
    """Both forms against autograd through the logits of a softmax."""
    logits = torch.tensor(POLICY, dtype=torch.float64).log().requires_grad_()
    rewards = torch.tensor(REWARDS, dtype=torch.float64)

    def gradient(value: torch.Tensor) -> list[float]:
        (found,) = torch.autograd.grad(value, logits)
        return found.tolist()  # type: ignore[no-any-return]

    expected = gradient(1 - (1 - (torch.softmax(logits, 0) * rewards).sum()) ** n)
    law = BestOfN(n, PASS_RATE)
    chances = torch.tensor(POLICY, dtype=torch.float64)
    positive = law.positive_weight * (chances * rewards * torch.log_softmax(logits, 0)).sum()
    assert gradient(positive) == pytest.approx(expected, abs=1e-9)
    incorrect = chances * (1 - rewards) / (1 - PASS_RATE)  # the law of incorrect samples
    negative = -law.negative_weight * (incorrect * torch.log_softmax(logits, 0)).sum()
    assert gradient(negative) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [1, 2, 8, 64])
def test_eq_4_is_an_integral(n: int) -> None:
    """The rank u of the best has the density n u^(n-1): its KL from the uniform law, by Gauss-Legendre."""
    nodes, factors = np.polynomial.legendre.leggauss(400)
    u = (nodes + 1) / 2
    density = n * u ** (n - 1)
    integral = float((factors / 2 * density * np.log(np.maximum(density, 1e-300))).sum())
    assert ranked_kl(n) == pytest.approx(integral, abs=1e-9)


def test_binary_rewards_have_ties_and_less_kl() -> None:
    assert [BestOfN(n, 0.3).kl for n in (2, 8, 64)] == pytest.approx([0.096, 0.935, 1.204], abs=5e-4)
    for n, rate in itertools.product((1, 2, 8, 64, 1000), (1e-6, 0.1, 0.3, 0.9, 1 - 1e-6)):
        assert -1e-12 <= BestOfN(n, rate).kl <= ranked_kl(n) + 1e-12
    assert BestOfN(8, 1e-12).kl == pytest.approx(0.0, abs=1e-9)
    assert BestOfN(10**6, 0.3).kl == pytest.approx(-math.log(0.3))  # only correct ones are left


@pytest.mark.parametrize("n", [1, 2, 8, 64])
@pytest.mark.parametrize("rate", [0.01, 0.3, 0.9])
def test_rejection_sampling_climbs_by_best_of_ns_factor(n: int, rate: float) -> None:
    assert h_prime(*weights("rejection_sampling", n), rate).item() == pytest.approx(
        BestOfN(n, rate).correct_factor, rel=1e-9
    )
    if n > 1:
        law = BestOfN(n, rate)
        assert h_value(*weights("pass_at_n", n, n=n), rate).item() == pytest.approx(law.success, abs=1e-9)
        assert h_prime(*weights("pass_at_n", n, n=n), rate).item() == pytest.approx(law.positive_weight, abs=1e-9)


@pytest.mark.parametrize("alpha", [5.0, 1.0, 0.1, 1e-4])
def test_eq_2_is_the_optimum(alpha: float) -> None:
    """J(pi) = alpha log Z - alpha KL(pi || pi*) for every policy, so that none is better than pi*."""
    optimum = KlOptimum((0.2, 0.5, 0.3), (1.0, 0.25, -0.5), alpha)
    best = optimum.policy
    assert math.fsum(best) == pytest.approx(1.0, abs=1e-9)
    assert optimum.objective(best) == pytest.approx(alpha * optimum.log_z, abs=1e-9)
    if alpha < 0.1:
        return  # chances of pi* that are 0 in floats
    for policy in ((0.2, 0.5, 0.3), (0.6, 0.3, 0.1), (1 / 3, 1 / 3, 1 / 3), (0.01, 0.01, 0.98)):
        gap = alpha * kl_divergence(policy, best)
        assert optimum.objective(policy) == pytest.approx(alpha * optimum.log_z - gap, abs=1e-9)


def test_the_log_odds_of_a_binary_reward_rise_by_one_over_alpha() -> None:
    assert KlOptimum((0.5, 0.5), (1.0, 0.0), 1 / math.log(3)).policy == pytest.approx((0.75, 0.25), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_best_of_n_is_an_optimum_of_eq_2(n: int) -> None:
    optimum = KlOptimum(POLICY, tuple(map(float, REWARDS)), BestOfN(n, PASS_RATE).alpha)
    assert optimum.policy == pytest.approx(enumerated(n), abs=1e-9)
    assert math.isinf(BestOfN(1, PASS_RATE).alpha)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"n must be >= 1 for best-of-n, got 0"):
        BestOfN(0, 0.5)
    for rate in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="the pass rate must be above 0 and below 1"):
            BestOfN(2, rate)
    with pytest.raises(ValueError, match="alpha must be a number > 0"):
        KlOptimum((1.0,), (0.0,), 0.0)
    with pytest.raises(ValueError, match="chances above 0 that sum to 1"):
        KlOptimum((0.5, 0.4), (0.0, 1.0), 1.0)
    with pytest.raises(ValueError, match="give one reward a chance"):
        KlOptimum((1.0,), (0.0, 1.0), 1.0)
