"""Holds the terms of losses. Each sum is divided by a global count, so that micro-batches and ranks simply add up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.algorithms.corrections import (
    MAX_LOG_RATIO,
    correction_metrics,
    correction_weights,
    largest,
    log_ratio_to_engine,
)
from megatron_oreal.config import Correction
from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Returns exp(log_ratio) up to MAX_LOG_RATIO; beyond it, the tangent of exp at that point, which cannot overflow.

    Up to MAX_LOG_RATIO, values and gradients are exactly those of exp. Beyond it the gradient stays at its largest
    value, so that a loss still moves the probability of an extreme token back.
    """
    return log_ratio.clamp_max(MAX_LOG_RATIO).exp() * (1.0 + F.relu(log_ratio - MAX_LOG_RATIO))


def kl_k3(logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
    """Estimates KL(policy || target) of each token, in nats, as exp(d) - d - 1 with d = target - logprobs."""
    difference = target_logprobs - logprobs
    return bounded_exp(difference) - difference - 1.0


def kl_mse(logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
    """Estimates the same KL as d^2 / 2, equal to second order; its gradient is an unbiased estimate of the KL's."""
    return 0.5 * (target_logprobs - logprobs).square()


KL_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k3": kl_k3, "mse": kl_mse}


def sequence_mean(values: Tensor, microbatch: Microbatch) -> Tensor:
    """Returns the mean over the trained tokens of each sequence, [T] -> [N]; it is 0 for a sequence that has none."""
    selected = torch.where(microbatch.loss_mask, values, 0.0)
    zeros = torch.zeros(microbatch.num_sequences, dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, microbatch.sequence_ids, selected)
    return sums / trained_tokens(microbatch).clamp_min(1)


def trained_tokens(microbatch: Microbatch) -> Tensor:
    """Returns the number of trained tokens of each sequence, [N]."""
    zeros = torch.zeros(microbatch.num_sequences, dtype=torch.int64, device=microbatch.loss_mask.device)
    return zeros.index_add(0, microbatch.sequence_ids, microbatch.loss_mask.long())


def outcome_cross_entropy(scores: Tensor, microbatch: Microbatch, num_sequences: int) -> LossOutput:
    """Returns the binary cross entropy of each sequence's mean score with its outcome (OREAL eq. 12). scores: [T]."""
    logits = sequence_mean(scores, microbatch)
    trained = trained_tokens(microbatch) > 0  # The filler at the end of a micro-batch has no trained token.
    labels = microbatch.is_correct.to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    loss = torch.where(trained, losses, 0.0).sum() / num_sequences
    right = ((logits > 0) == microbatch.is_correct) & trained
    return LossOutput(loss, {"loss": loss.detach(), "accuracy": right.sum() / num_sequences})


def cross_entropy(outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
    """Returns the mean negative log-prob of the trained tokens."""
    loss = -outputs.values.index_select(0, microbatch.trained).sum() / batch.num_tokens
    return LossOutput(loss, {"loss": loss.detach(), "entropy": mean_entropy(outputs, batch).detach()})


def mean_entropy(outputs: TokenOutputs, batch: Batch) -> Tensor:
    """Returns this micro-batch's share of the mean entropy over trained tokens, in nats."""
    assert outputs.entropy is not None
    return outputs.entropy.sum() / batch.num_tokens


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """The terms that every policy loss uses: one micro-batch's old and new log-probs, their ratio, and token means.

    The first pass over a batch keeps its log-probs as the old ones (keep="old_logprobs"): its ratio to the old policy
    is 1, and only the ratio's gradient matters. If a micro-batch holds no old log-probs, the loss treats its own pass
    as the first one and writes nothing.
    """

    outputs: TokenOutputs
    microbatch: Microbatch
    batch: Batch
    correction: Correction | None  # For off-policy samples; None corrects nothing.

    def __post_init__(self) -> None:
        if self.microbatch.old_logprobs is None:
            first = replace(self.microbatch, old_logprobs=self.outputs.values.detach())
            object.__setattr__(self, "microbatch", first)

    @property
    def logprobs(self) -> Tensor:
        """Returns the policy's log-probs, [T], with a gradient."""
        return self.outputs.values

    @property
    def old_logprobs(self) -> Tensor:
        """Returns the log-probs from before the step's first update, [T]; with old_logprobs=engine, the engine's."""
        kept, known = self.microbatch.old_logprobs, self.microbatch.engine_logprobs
        assert kept is not None
        if self.correction is None or self.correction.old_logprobs == "trainer":
            return kept
        return torch.where(known.isnan(), kept, known)

    @property
    def ratio(self) -> Tensor:
        """Returns each token's probability divided by the old policy's, [T], with a gradient; see `bounded_exp`."""
        return bounded_exp(self.logprobs - self.old_logprobs)

    def corrected(self, coefficients: Tensor) -> Tensor:
        """Returns the coefficients [T], multiplied by the weights that correct for off-policy samples."""
        if self.correction is None:
            return coefficients
        return coefficients * correction_weights(self.microbatch, self.correction)

    def mean(self, values: Tensor) -> Tensor:
        """Returns this micro-batch's share of the mean of values [T] over all trained tokens of the batch."""
        return values.index_select(0, self.microbatch.trained).sum() / self.batch.num_tokens

    def kl(self, kind: str, target_logprobs: Tensor) -> Tensor:
        """Returns this micro-batch's share of the mean KL divergence to the target, in nats a token."""
        return self.mean(KL_KINDS[kind](self.logprobs, target_logprobs))

    def entropy(self) -> Tensor:
        """Returns this micro-batch's share of the mean entropy over trained tokens, in nats."""
        return mean_entropy(self.outputs, self.batch)

    def output(self, loss: Tensor, metrics: dict[str, Tensor]) -> LossOutput:
        """Returns the loss with the given metrics and with those of every policy loss, all detached."""
        metrics = metrics | {"loss": loss} | engine_mismatch(self.microbatch, self.batch)
        if self.correction is not None:
            metrics |= correction_metrics(self.microbatch, self.batch, self.correction)
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def engine_mismatch(microbatch: Microbatch, batch: Batch) -> dict[str, Tensor]:
    """Measures how far the trainer's log-probs of the sampled tokens, before its update, are from the engine's.

    With d = trainer - engine for each token, in nats: "mismatch" is the mean of |d|, "mismatch_max" its maximum,
    "mismatch_ratio" the mean of exp|d|. "mismatch_kl_k1" (mean of -d) and "mismatch_kl_k3" (mean of exp(d) - d - 1)
    estimate KL(engine || trainer) without bias. Both sides are log-probs of the distribution at the rollout's
    temperature before top_p and top_k. The engine samples from this distribution unless top_p or top_k truncates it.
    """
    difference = log_ratio_to_engine(microbatch)
    magnitude = difference.abs()
    means = {
        "mismatch": magnitude,
        "mismatch_ratio": magnitude.exp(),
        "mismatch_kl_k1": -difference,
        "mismatch_kl_k3": difference.exp() - difference - 1.0,
    }
    metrics = {name: values.sum() / batch.num_tokens for name, values in means.items()}
    return metrics | {"mismatch_max": largest(magnitude)}
