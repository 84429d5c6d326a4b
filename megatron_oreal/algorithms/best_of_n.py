"""Two policies in closed form, for binary rewards: best-of-n sampling, and the optimum under a KL penalty.

The source is OREAL (arXiv:2502.06781), eq. 2 and 4 to 6. `pass_rate` is p, the chance that one sample of the policy is
correct. Best-of-n draws n samples and keeps a correct one where there is any. All arithmetic is that of floats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BestOfN:
    """The law of the sample that best-of-n keeps, against the policy's own.

    Example: BestOfN(2, 0.5) is correct with 0.75; it makes each correct sample 1.5 times as likely as the policy does.
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
        """The chance that the kept sample is correct: 1 - (1-p)^n."""
        return -math.expm1(self.num_samples * math.log1p(-self.pass_rate))

    @property
    def correct_factor(self) -> float:
        """Eq. 5: how much likelier each correct sample becomes, (1 - (1-p)^n) / p.

        It is h' of rejection sampling from groups of n: the mean over the correct samples of a group climbs as if each
        of them was drawn from best-of-n.
        """
        return self.success / self.pass_rate

    @property
    def incorrect_factor(self) -> float:
        """Eq. 5: how much likelier each incorrect sample becomes, (1-p)^(n-1)."""
        return (1.0 - self.pass_rate) ** (self.num_samples - 1)

    @property
    def positive_weight(self) -> float:
        """Eq. 6: n (1-p)^(n-1), the derivative of `success` by p.

        The gradient of `success` is this weight times E[R grad log pi], over samples of the policy.
        """
        return self.num_samples * (1.0 - self.pass_rate) ** (self.num_samples - 1)

    @property
    def negative_weight(self) -> float:
        """Eq. 6: n (1-p)^n.

        The gradient of `success` is minus this weight times the mean of grad log pi over the incorrect samples.
        """
        return self.num_samples * (1.0 - self.pass_rate) ** self.num_samples

    @property
    def kl(self) -> float:
        """KL(best-of-n || policy) in nats, for binary rewards; at most that of `ranked_kl`."""
        failure = (1.0 - self.pass_rate) ** self.num_samples
        lost = (self.num_samples - 1) * math.log1p(-self.pass_rate)  # the log of `incorrect_factor`, which may be 0
        return self.success * math.log(self.correct_factor) + failure * lost

    @property
    def alpha(self) -> float:
        """The weight of the KL for which best-of-n is the optimum of eq. 2; infinite where n is 1."""
        spread = math.log(self.correct_factor) - (self.num_samples - 1) * math.log1p(-self.pass_rate)
        return math.inf if self.num_samples == 1 else 1.0 / spread


def ranked_kl(num_samples: int) -> float:
    """Eq. 4: KL(best-of-n || policy) = log n - (n-1)/n, where a reward ranks all samples without ties."""
    if num_samples < 1:
        raise ValueError(f"n must be >= 1 for best-of-n, got {num_samples}")
    return math.log(num_samples) - (num_samples - 1) / num_samples


@dataclass(frozen=True, slots=True)
class KlOptimum:
    """Eq. 2: the policy pi* = pi_0 exp(Q / alpha) / Z, which maximises E[Q] - alpha KL(pi || pi_0).

    Example: with two answers of chance 1/2, rewards 1 and 0, and alpha = 1 / log 3, pi* is [3/4, 1/4].
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
        """The log of Z. The optimal objective is alpha times this."""
        highest = max(self.rewards)  # taken out, so that small alpha does not overflow
        terms = [p * math.exp((q - highest) / self.alpha) for p, q in zip(self.initial, self.rewards, strict=True)]
        return highest / self.alpha + math.log(math.fsum(terms))

    @property
    def policy(self) -> tuple[float, ...]:
        """The optimal policy pi*."""
        log_z = self.log_z
        return tuple(p * math.exp(q / self.alpha - log_z) for p, q in zip(self.initial, self.rewards, strict=True))

    def objective(self, policy: Sequence[float]) -> float:
        """E[Q] - alpha KL(policy || pi_0)."""
        reward = math.fsum(p * q for p, q in zip(policy, self.rewards, strict=True))
        return reward - self.alpha * kl_divergence(policy, self.initial)


def kl_divergence(first: Sequence[float], second: Sequence[float]) -> float:
    """KL(first || second) in nats, of two laws over the same answers."""
    return math.fsum(p * math.log(p / q) for p, q in zip(first, second, strict=True) if p > 0)
