"""Whether FP8 log-probs are good enough to train on, measured on the run's own tokens, and the way back when not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_oreal.kernels.gemms import Precision


@dataclass(frozen=True, slots=True)
class GateReport:
    """Of d = FP8 log-prob - bf16 log-prob over a batch's tokens."""

    num_tokens: int
    mean_ratio: float  # mean exp |d|
    p99_difference: float  # 99th percentile of |d|, in nats
    mean_kl: float  # KL(bf16 || FP8) a token, estimated by exp(d) - 1 - d of the sampled tokens
    outside_share: float  # tokens whose ratio exp(d) is outside the gate's clip range
    reason: str  # what failed, one line; empty: it passes

    @property
    def passes(self) -> bool:
        return not self.reason


@dataclass(frozen=True, slots=True)
class Fp8Gate:
    """Limits: a ratio of policies beyond clip_low and clip_high would be clipped for the sake of rounding alone."""

    max_mean_ratio: float = 1.03
    max_p99_difference: float = 0.2
    max_mean_kl: float = 1e-3
    max_outside_share: float = 0.005
    clip_low: float = 0.8
    clip_high: float = 1.2

    @torch.no_grad()
    def measure(self, logprobs_fp8: Tensor, logprobs_bf16: Tensor) -> GateReport:
        """Both [t], t > 0, of the same sampled tokens. Log-probs that are not finite never pass."""
        if logprobs_fp8.shape != logprobs_bf16.shape or logprobs_fp8.numel() == 0:
            raise ValueError(
                f"the FP8 gate compares log-probs of the same tokens, got {tuple(logprobs_fp8.shape)} "
                f"and {tuple(logprobs_bf16.shape)}"
            )
        difference = logprobs_fp8.double() - logprobs_bf16.double()
        ratio = difference.exp()
        size = difference.abs()
        # Of sorted values, not quantile(): it refuses more than 16 million.
        p99 = size.sort().values[min(len(size) - 1, int(0.99 * len(size)))]
        outside = (ratio < self.clip_low) | (ratio > self.clip_high)
        mean_ratio, p99_difference, mean_kl, outside_share = torch.stack(
            [size.exp().mean(), p99, (ratio - 1 - difference).mean(), outside.double().mean()]
        ).tolist()
        checks = [
            ("mean exp|d|", mean_ratio, self.max_mean_ratio),
            ("p99 |d|", p99_difference, self.max_p99_difference),
            ("mean KL", mean_kl, self.max_mean_kl),
            (f"share outside [{self.clip_low:g}, {self.clip_high:g}]", outside_share, self.max_outside_share),
        ]
        # `not <=`: NaN fails too.
        failed = [f"{name} {value:.3g} > {limit:g}" for name, value, limit in checks if not value <= limit]
        return GateReport(len(size), mean_ratio, p99_difference, mean_kl, outside_share, ", ".join(failed))


Measured = Callable[[Precision, slice], Tensor]  # log-probs [t] of these tokens at this precision


@dataclass(slots=True)
class GuardedPrecision:
    """FP8 until a measurement on the batch at hand fails; bf16 from then on. A head holds one.

    Every rank that shares the tokens measures the same numbers, and decides the same.
    """

    precision: Precision = "fp8"
    every: int = 100  # calls between measurements; the first call measures
    max_tokens: int = 2048  # of a measurement
    gate: Fp8Gate = field(default_factory=Fp8Gate)
    report: GateReport | None = None  # of the last measurement
    _num_calls: int = 0

    def check(self, num_tokens: int, logprobs: Measured) -> str | None:
        """Call before each use of `precision`. Returns a line for the log when it has fallen back just now.

        Only FP8 values are measured: where FP8 computes gradients alone, the values are bf16's.
        """
        if self.precision != "fp8" or num_tokens == 0:
            return None
        is_due = self._num_calls % self.every == 0
        self._num_calls += 1
        if not is_due:
            return None
        tokens = slice(0, min(num_tokens, self.max_tokens))
        with torch.no_grad():
            self.report = self.gate.measure(logprobs("fp8", tokens), logprobs("bf16", tokens))
        if self.report.passes:
            return None
        self.precision = "bf16"
        return f"fp8 log-probs failed on {self.report.num_tokens} tokens ({self.report.reason}): bf16 from now on"
