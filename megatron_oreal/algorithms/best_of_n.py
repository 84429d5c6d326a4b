"""Computes two policies in closed form for binary rewards: best-of-n sampling, and the optimum under a KL penalty.

The source is OREAL (arXiv:2502.06781), eq. 2 and 4 to 6. `pass_rate` is p, the probability that one sample of the
policy is correct. Best-of-n draws n samples and keeps a correct one if there is any. All arithmetic uses Python floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BestOfN:
    """The distribution of the sample that best-of-n keeps, compared with the policy's distribution.

    Example: BestOfN(2, 0.5) is correct with probability 0.75; each correct sample is 1.5 times as likely as under the
    policy.
    """

    num_samples: int  # n
    pass_rate: float  # p, above 0 and below 1

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError(f"n must be >= 1 for best-of-n, got {self.num_samples}")
        if not 0.0 < self.pass_rate < 1.0:
            raise ValueError(f"the pass rate must be above 0 and below 1, got {self.pass_rate}")

    @property
    def success(self) -> float:
        """Returns the probability that the kept sample is correct: 1 - (1-p)^n."""
        return -math.expm1(self.num_samples * math.log1p(-self.pass_rate))

    @property
    def correct_factor(self) -> float:
        """Returns the factor by which each correct sample becomes more likely (eq. 5): (1 - (1-p)^n) / p.

        The factor equals h' of rejection sampling from groups of n: the mean gradient over a group's correct samples is
        the gradient for samples drawn from best-of-n.
        """
        return self.success / self.pass_rate

    @property
    def incorrect_factor(self) -> float:
        """Returns the factor by which each incorrect sample becomes more likely (eq. 5): (1-p)^(n-1)."""
        return (1.0 - self.pass_rate) ** (self.num_samples - 1)

    @property
    def positive_weight(self) -> float:
        """Returns n (1-p)^(n-1) (eq. 6), the derivative of `success` with respect to p.

        The gradient of `success` is this weight times E[R grad log pi] over samples of the policy.
        """
        return self.num_samples * (1.0 - self.pass_rate) ** (self.num_samples - 1)

    @property
    def negative_weight(self) -> float:
        """Returns n (1-p)^n (eq. 6).

        The gradient of `success` is minus this weight times the mean of grad log pi over the incorrect samples.
        """
        return self.num_samples * (1.0 - self.pass_rate) ** self.num_samples

    @property
    def kl(self) -> float:
        """Returns KL(best-of-n || policy) in nats for binary rewards; it never exceeds `ranked_kl`."""
        failure = (1.0 - self.pass_rate) ** self.num_samples
        lost = (self.num_samples - 1) * math.log1p(-self.pass_rate)  # the log of `incorrect_factor`, which may be 0
        return self.success * math.log(self.correct_factor) + failure * lost

    @property
    def alpha(self) -> float:
        """Returns the KL weight for which best-of-n is the optimum of eq. 2; it is infinite for n = 1."""
        spread = math.log(self.correct_factor) - (self.num_samples - 1) * math.log1p(-self.pass_rate)
        return math.inf if self.num_samples == 1 else 1.0 / spread


def ranked_kl(num_samples: int) -> float:
    """Returns KL(best-of-n || policy) = log n - (n-1)/n (eq. 4), for a reward that ranks all samples without ties."""
    if num_samples < 1:
        raise ValueError(f"n must be >= 1 for best-of-n, got {num_samples}")
    return math.log(num_samples) - (num_samples - 1) / num_samples


@dataclass(frozen=True, slots=True)
class KlOptimum:
    """The policy pi* = pi_0 exp(Q / alpha) / Z of eq. 2, which maximises E[Q] - alpha KL(pi || pi_0).

    Example: with two answers of probability 1/2, rewards 1 and 0, and alpha = 1 / log 3, pi* is [3/4, 1/4].
    """

    initial: tuple[float, ...]  # pi_0, each above 0
    rewards: tuple[float, ...]  # Q
    alpha: float

    def __post_init__(self) -> None:
        if len(self.initial) != len(self.rewards):
            raise ValueError(f"{len(self.initial)} chances and {len(self.rewards)} rewards: give one reward a chance")
        if min(self.initial, default=0.0) <= 0.0 or not math.isclose(math.fsum(self.initial), 1.0):
            raise ValueError(f"the initial policy must have chances above 0 that sum to 1, got {list(self.initial)}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"alpha must be a number > 0, got {self.alpha}")

    @property
    def log_z(self) -> float:
        """Returns the log of Z. The optimal value of the objective is alpha times this number."""
        highest = max(self.rewards)  # Subtracted first, so that a small alpha does not overflow.
        terms = [p * math.exp((q - highest) / self.alpha) for p, q in zip(self.initial, self.rewards, strict=True)]
        return highest / self.alpha + math.log(math.fsum(terms))

    @property
    def policy(self) -> tuple[float, ...]:
        """Returns the optimal policy pi*."""
        log_z = self.log_z
        return tuple(p * math.exp(q / self.alpha - log_z) for p, q in zip(self.initial, self.rewards, strict=True))

    def objective(self, policy: Sequence[float]) -> float:
        """Returns E[Q] - alpha KL(policy || pi_0)."""
        reward = math.fsum(p * q for p, q in zip(policy, self.rewards, strict=True))
        return reward - self.alpha * kl_divergence(policy, self.initial)


def kl_divergence(first: Sequence[float], second: Sequence[float]) -> float:
    """Returns KL(first || second) in nats for two distributions over the same answers."""
    return math.fsum(p * math.log(p / q) for p, q in zip(first, second, strict=True) if p > 0)
