r"""Computes estimates from n sampled answers to each of Q questions, with intervals, and paired tests of two policies.

Confidence intervals resample the questions: they speak about another draw of questions of the same kind, each answered
anew. Where all questions have the same value (0 of 30 solved) the interval is a point, which is no sign of certainty.

pass@k: Chen et al. 2021, arXiv:2107.03374, equation 1. maj@k: Wang et al. 2022, arXiv:2203.11171, as an expectation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95
BLOCK = 1 << 22  # resampled counts held at once


@dataclass(slots=True, frozen=True)
class Estimate:
    """A mean over questions with its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(slots=True, frozen=True)
class PairedDifference:
    difference: Estimate  # second - first
    p_value: float  # two-sided


@dataclass(slots=True, frozen=True)
class McNemar:
    only_first: int  # questions that only the first one solved
    only_second: int
    p_value: float  # two-sided, exact


def pass_at_k(num_correct: int, num_samples: int, k: int) -> float:
    """Returns the chance that k samples, drawn without replacement, hold a correct one: an unbiased pass@k."""
    check_draws(k, num_samples)
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(votes: Sequence[Hashable | None], is_correct: Sequence[bool], k: int) -> float:
    """Returns the probability that the most frequent of k answers, drawn without replacement, is correct.

    votes: the samples' answers; None abstains. Of equally frequent answers each wins with the same chance, so nothing
    depends on the samples' order. Without a vote the majority is wrong. An answer is correct if one of its samples is.
    Exact: sums over how often the winner is drawn, and counts the draws of the others by their size and their ties.
    """
    check_draws(k, len(votes))
    sizes = Counter(vote for vote in votes if vote is not None)
    right = {vote for vote, correct in zip(votes, is_correct, strict=True) if correct and vote is not None}
    if k == len(votes):  # one draw only: all of them
        most = max(sizes.values(), default=0)
        leaders = [vote for vote, size in sizes.items() if size == most]
        return len(right.intersection(leaders)) / len(leaders) if leaders else 0.0
    num_abstaining = len(votes) - sizes.total()
    wins = 0.0
    for winner in right:
        others = [size for vote, size in sizes.items() if vote != winner]
        for times in range(1, min(sizes[winner], k) + 1):
            draws = draws_by_ties(others, num_abstaining, k - times, times)
            weighted = sum(count / (1 + ties) for ties, count in draws.items())
            wins += math.comb(sizes[winner], times) * weighted
    return wins / math.comb(len(votes), k)


def draws_by_ties(sizes: Sequence[int], num_abstaining: int, total: int, limit: int) -> dict[int, int]:
    """Draws of `total` samples with at most `limit` of each answer: {answers drawn exactly `limit` times: draws}."""
    # (samples drawn so far, answers at the limit) -> draws
    counts = {(drawn, 0): math.comb(num_abstaining, drawn) for drawn in range(min(num_abstaining, total) + 1)}
    for size in sizes:
        extended: Counter[tuple[int, int]] = Counter()
        for (drawn, ties), count in counts.items():
            for more in range(min(size, limit, total - drawn) + 1):
                extended[drawn + more, ties + (more == limit)] += count * math.comb(size, more)
        counts = extended
    return {ties: count for (drawn, ties), count in counts.items() if drawn == total}


def check_draws(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must be from 1 to the {num_samples} samples of each question, got {k}")


def bootstrap_mean(
    values: ArrayLike,  # [Q]
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns the mean over questions with the percentile interval of its bootstrap, which the seed determines."""
    sample = np.asarray(values, dtype=np.float64)
    means = resampled_means(sample, num_resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(sample.mean()), float(low), float(high))


def resampled_means(values: NDArray[np.float64], num_resamples: int, seed: int) -> NDArray[np.float64]:
    """Returns the means [num_resamples] of bootstrap resamples: all questions, drawn with replacement.

    Questions with the same value are drawn together: how often each value comes up is multinomial.
    """
    assert values.ndim == 1 and values.size, "one value a question"
    distinct, counts = np.unique(values, return_counts=True)
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // distinct.size)
    blocks = [
        generator.multinomial(values.size, counts / values.size, size=min(rows, num_resamples - start)) @ distinct
        for start in range(0, num_resamples, rows)
    ]
    return np.concatenate(blocks) / values.size


def paired_bootstrap(
    first: ArrayLike,  # [Q]
    second: ArrayLike,  # [Q], of the same questions
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> PairedDifference:
    """Returns the difference of two means over the same questions, its interval, and whether it may be none.

    The p-value resamples the differences shifted to mean 0; it is never below 1 / (num_resamples + 1).
    """
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    estimate = bootstrap_mean(differences, confidence, num_resamples, seed)
    shifted = resampled_means(differences - differences.mean(), num_resamples, seed)
    rounding = 1e-12
    num_as_large = int((np.abs(shifted) >= abs(estimate.value) - rounding).sum())
    return PairedDifference(estimate, (1 + num_as_large) / (1 + num_resamples))


def mcnemar_exact(first: Sequence[bool], second: Sequence[bool]) -> McNemar:
    """Tests whether two policies solve the same share of the same questions, by the questions that only one solved."""
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = (sum(pair == which for pair in pairs) for which in ((True, False), (False, True)))
    num_different = only_first + only_second
    tail = sum(math.comb(num_different, count) for count in range(min(only_first, only_second) + 1))
    return McNemar(only_first, only_second, min(1.0, 2 * tail / 2**num_different))
