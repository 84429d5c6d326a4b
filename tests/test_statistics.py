"""pass@k and maj@k against every draw, intervals against their coverage, tests against hand-computed values."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from megatron_oreal.statistics import bootstrap_mean, majority_at_k, mcnemar_exact, paired_bootstrap, pass_at_k


@pytest.mark.parametrize("num_correct", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(num_correct: int, k: int) -> None:
    samples = [True] * num_correct + [False] * (6 - num_correct)
    draws = [any(draw) for draw in itertools.combinations(samples, k)]
    assert pass_at_k(num_correct, 6, k) == pytest.approx(sum(draws) / len(draws), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """The binomial mean of the estimator is the chance that k fresh samples hold a correct one."""
    n, k, p = 8, 3, 0.3
    expected = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(c, n, k) for c in range(n + 1))
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def majority_by_enumeration(votes: Sequence[str | None], is_correct: Sequence[bool], k: int) -> Fraction:
    right = {vote for vote, correct in zip(votes, is_correct, strict=True) if correct}
    wins, num_draws = Fraction(0), 0
    for draw in itertools.combinations(votes, k):
        num_draws += 1
        counts = Counter(vote for vote in draw if vote is not None)
        leaders = [vote for vote in counts if counts[vote] == max(counts.values())]
        wins += Fraction(sum(leader in right for leader in leaders), len(leaders)) if leaders else 0
    return wins / num_draws


@pytest.mark.parametrize("votes", ["aabbc-", "aaabbb", "abcdef", "a-----", "aabcc--b", "bbbba", "aAbbb", "------"])
def test_majority_at_k_is_the_mean_over_all_draws(votes: str) -> None:
    """Both "a" and "A" are correct: two spellings that only algebra finds equal."""
    answers = [None if vote == "-" else vote for vote in votes]
    is_correct = [vote in ("a", "A") for vote in votes]
    for k in range(1, len(votes) + 1):
        expected = float(majority_by_enumeration(answers, is_correct, k))
        assert majority_at_k(answers, is_correct, k) == pytest.approx(expected, abs=1e-12)


def test_the_order_of_tied_answers_does_not_matter() -> None:
    assert majority_at_k(["a", "b"], [True, False], 2) == majority_at_k(["b", "a"], [False, True], 2) == 0.5
    assert majority_at_k(["a", "b", "c", "d"], [True, False, False, False], 3) == 0.25


def test_a_majority_of_many_samples_is_exact() -> None:
    votes = [*"a" * 20, *"b" * 24, *map(str, range(20))]
    is_correct = [vote == "a" for vote in votes]
    assert majority_at_k(votes, is_correct, 64) == 0
    assert majority_at_k(votes, is_correct, 1) == pytest.approx(20 / 64)
    at_16 = majority_at_k(votes, is_correct, 16)
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(4000):
        counts = Counter(rng.choice(votes, 16, replace=False).tolist())
        leaders = [vote for vote in counts if counts[vote] == max(counts.values())]
        draws.append(("a" in leaders) / len(leaders))
    assert at_16 == pytest.approx(np.mean(draws), abs=0.03)


@pytest.mark.parametrize("k", [0, 4])
def test_more_draws_than_samples_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be from 1 to the 3 samples of each question, got {k}"):
        pass_at_k(1, 3, k)
    with pytest.raises(ValueError, match="k must be from 1 to the 3 samples"):
        majority_at_k(["a", "b", None], [True, False, False], k)


def test_the_interval_is_the_normal_one_for_many_questions() -> None:
    values = [1.0] * 300 + [0.0] * 700
    estimate = bootstrap_mean(values)
    half = 1.959964 * math.sqrt(0.3 * 0.7 / 1000)
    assert estimate.value == pytest.approx(0.3)
    assert (estimate.low, estimate.high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)
    assert bootstrap_mean(values) == estimate
    assert bootstrap_mean(values, num_resamples=100, seed=1) != bootstrap_mean(values, num_resamples=100)


def test_values_between_zero_and_one_are_resampled_as_they_are() -> None:
    """The multinomial of distinct values against drawing the questions themselves."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, size=50) / 8
    drawn = values[rng.integers(50, size=(20_000, 50))].mean(axis=1)
    estimate = bootstrap_mean(values, num_resamples=20_000)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.006)


def test_a_constant_has_no_width() -> None:
    estimate = bootstrap_mean([0.0] * 30)
    assert (estimate.value, estimate.low, estimate.high) == (0, 0, 0)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        difficulty = rng.beta(0.6, 0.9, size=100)  # mean 0.4
        estimate = bootstrap_mean(rng.binomial(8, difficulty) / 8, confidence=0.9, num_resamples=500)
        covered += estimate.low <= 0.4 <= estimate.high
    assert 0.86 <= covered / 400 <= 0.94


def test_mcnemar_by_hand() -> None:
    """1 against 6: 2 (C(7,0) + C(7,1)) / 2^7."""
    first = [True] * 10 + [True] + [False] * 6
    second = [True] * 10 + [False] + [True] * 6
    test = mcnemar_exact(first, second)
    assert (test.only_first, test.only_second, test.p_value) == (1, 6, 0.125)
    assert mcnemar_exact(second, first).p_value == 0.125
    assert mcnemar_exact([True, False], [False, True]).p_value == 1
    assert mcnemar_exact([True], [True]).p_value == 1
    assert mcnemar_exact([True] * 3000, [False] * 3000).p_value == 0  # below the smallest float, and no overflow


def test_the_paired_bootstrap_sees_what_an_unpaired_comparison_does_not() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(200)  # questions differ far more than the policies
    second = first + rng.normal(0.02, 0.05, size=200)
    paired = paired_bootstrap(first, second)
    assert paired.difference.value == pytest.approx(float((second - first).mean()))
    assert paired.difference.low > 0 and paired.p_value < 0.001
    same = paired_bootstrap(first, first)
    assert (same.difference.value, same.p_value) == (0, 1)


def test_p_values_are_uniform_where_there_is_no_difference() -> None:
    rng = np.random.default_rng(0)
    p_values = [
        paired_bootstrap(rng.binomial(8, 0.4, 100) / 8, rng.binomial(8, 0.4, 100) / 8, num_resamples=500).p_value
        for _ in range(400)
    ]
    for level in (0.1, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.07)
