"""Corrects a loss for off-policy samples: it weights and masks the tokens that another distribution has sampled.

The ratio of a token is r = pi_old / pi_engine: the trainer's probability before the step's first update, divided by the
probability with which the engine sampled the token. It differs from 1 when the engine has older weights (staleness), or
when its kernels round differently (mismatch). A weight is r, or the product of r over the sequence, cut at a cap
(truncated importance sampling, TIS: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"). A mask sets the weight of a token to 0 when a ratio lies outside the bounds: masked importance sampling
(MIS: Liu et al. 2025, "When speed kills stability") has an upper bound, IcePop (Zhao et al. 2025) bounds both sides,
and a sequence's geometric mean can be bounded. Masked tokens stay in the denominators of the loss. All ratios are
clamped to [e^-20, e^20]; a token whose log-prob the engine does not tell has the ratio 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.config import Correction
from megatron_oreal.types import Batch, Microbatch

# The logarithm of the largest ratio that is used unchanged. Without this bound, a single token to which the policy, the
# target or the engine gives probability 0 would make a loss or a metric infinite, and an infinite loss stops the run.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, slots=True)
class Segments:
    """The index of the sequence that each of T' tokens belongs to.

    Example: two sequences of 2 and 1 tokens are `Segments(ids=tensor([0, 0, 1]), count=2)`."""

    ids: Tensor  # [T'] int64, index into [N]
    count: int  # N

    def total(self, values: Tensor) -> Tensor:
        """Returns, for each token, the sum of the values of its sequence: [T'] -> [T']."""
        return values.new_zeros(self.count).index_add(0, self.ids, values)[self.ids]

    def mean(self, values: Tensor) -> Tensor:
        return self.total(values) / self.total(torch.ones_like(values))


def token_ratio(log_ratio: Tensor, _segments: Segments) -> Tensor:
    """Returns the ratio of each token, from the logarithms of the ratios: [T'] -> [T']."""
    return bounded(log_ratio).exp()


def sequence_ratio(log_ratio: Tensor, segments: Segments) -> Tensor:
    """Returns, for each token, the product of the ratios of its sequence: [T'] -> [T']."""
    return bounded(segments.total(log_ratio)).exp()


def geometric_ratio(log_ratio: Tensor, segments: Segments) -> Tensor:
    """Returns, for each token, the geometric mean of the ratios of its sequence: [T'] -> [T']."""
    return bounded(segments.mean(log_ratio)).exp()


RATIOS: dict[str, Callable[[Tensor, Segments], Tensor]] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "geometric": geometric_ratio,
}


@dataclass(frozen=True, slots=True)
class Weights:
    """The corrections of T' tokens."""

    ratio: Tensor  # [T'], before it is cut at the cap
    kept: Tensor  # [T'] bool, False for masked tokens
    weight: Tensor  # [T'], 0 for masked tokens


def weigh(log_ratio: Tensor, segments: Segments, correction: Correction) -> Weights:
    """Returns the weight of each token. log_ratio: [T'], log(pi_old / pi_engine)."""
    ratio = RATIOS[correction.importance_level](log_ratio, segments)
    cap = correction.importance_cap
    weight = torch.ones_like(ratio) if cap is None else ratio.clamp_max(cap)
    kept = torch.ones_like(ratio, dtype=torch.bool)
    if correction.mask_level != "none":
        judged = RATIOS[correction.mask_level](log_ratio, segments)
        kept = (judged >= correction.mask_low) & (judged <= correction.mask_high)
    if correction.mask_veto is not None:
        vetoes = token_ratio(log_ratio, segments) < correction.mask_veto
        kept = kept & (segments.total(vetoes.to(ratio.dtype)) == 0)
    return Weights(ratio, kept, torch.where(kept, weight, 0.0) if correction.masks else weight)


def correction_weights(microbatch: Microbatch, correction: Correction) -> Tensor:
    """Returns the weight of each trained token and 1 elsewhere: [T], without a gradient."""
    weights = torch.ones_like(microbatch.engine_logprobs)
    found = weigh_microbatch(microbatch, correction).weight.to(weights.dtype)
    return weights.index_copy_(0, microbatch.trained, found)


def correction_metrics(microbatch: Microbatch, batch: Batch, correction: Correction) -> dict[str, Tensor]:
    """Returns the mean of the weights, the largest ratio before cap and mask, and the shares that cap and mask cut."""
    found, metrics = weigh_microbatch(microbatch, correction), {}
    if correction.importance_cap is not None or correction.masks:
        metrics = {
            "importance_mean": found.weight.sum() / batch.num_tokens,
            "importance_max": largest(found.ratio),
        }
    if correction.importance_cap is not None:
        metrics["importance_capped_share"] = (found.ratio > correction.importance_cap).sum() / batch.num_tokens
    if correction.masks:
        metrics["importance_masked_share"] = (~found.kept).sum() / batch.num_tokens
    return metrics


def weigh_microbatch(microbatch: Microbatch, correction: Correction) -> Weights:
    sequences = microbatch.sequence_ids.index_select(0, microbatch.trained)
    return weigh(log_ratio_to_engine(microbatch), Segments(sequences, microbatch.num_sequences), correction)


def log_ratio_to_engine(microbatch: Microbatch) -> Tensor:
    """Returns log(pi_old / pi_engine) of the trained tokens, in nats; 0 where the engine's log-prob is unknown."""
    assert microbatch.old_logprobs is not None, 'the first pass needs keep="old_logprobs"'
    known = microbatch.engine_logprobs.index_select(0, microbatch.trained)
    difference = microbatch.old_logprobs.index_select(0, microbatch.trained) - known
    return bounded(torch.where(known.isnan(), 0.0, difference))


def bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
