"""The parts of losses. Every sum is divided by a global count, so that micro-batches and ranks simply add up."""

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
    """Returns exp(log_ratio), and beyond MAX_LOG_RATIO the tangent of exp there, which does not overflow.

    Up to there, values and gradients are exactly those of exp. Beyond it the gradient keeps its sign and stays at its
    largest value, so that a token that became far too likely, or far too unlikely, is still pulled back.
    """
    return log_ratio.clamp_max(MAX_LOG_RATIO).exp() * (1.0 + F.relu(log_ratio - MAX_LOG_RATIO))


def kl_k3(logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
    """Estimates KL(policy || target) of each token, in nats, as exp(d) - d - 1 with d = target - logprobs."""
    difference = target_logprobs - logprobs
    return bounded_exp(difference) - difference - 1.0


def kl_mse(logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
    """Estimates the same as d^2 / 2, equal to second order; its gradient estimates that of the KL without bias."""
    return 0.5 * (target_logprobs - logprobs).square()


KL_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k3": kl_k3, "mse": kl_mse}


def sequence_mean(values: Tensor, microbatch: Microbatch) -> Tensor:
    """Returns the mean over the trained tokens of each sequence, [T] -> [N]; it is 0 for a sequence without any."""
    selected = torch.where(microbatch.loss_mask, values, 0.0)
    zeros = torch.zeros(microbatch.num_sequences, dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, microbatch.sequence_ids, selected)
    return sums / trained_tokens(microbatch).clamp_min(1)


def trained_tokens(microbatch: Microbatch) -> Tensor:
    """Returns the number of trained tokens of each sequence, [N]."""
    zeros = torch.zeros(microbatch.num_sequences, dtype=torch.int64, device=microbatch.loss_mask.device)
    return zeros.index_add(0, microbatch.sequence_ids, microbatch.loss_mask.long())


def outcome_cross_entropy(scores: Tensor, microbatch: Microbatch, num_sequences: int) -> LossOutput:
    """OREAL eq. 12: binary cross entropy of each sequence's mean score with its outcome. scores: [T]."""
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
    """What the losses of all policies are made of: one micro-batch's log-probs, old and new, and means over tokens.

    The first pass over a batch keeps its log-probs as the old ones (keep="old_logprobs"): its ratio to the old policy
    is 1, and only the ratio's gradient matters. A loss on a micro-batch for which nothing was kept takes its own pass
    as the first one; it writes nothing.
    """

    outputs: TokenOutputs
    microbatch: Microbatch
    batch: Batch
    correction: Correction | None  # Of samples that are not the trained policy's own; None: nothing is corrected.

    def __post_init__(self) -> None:
        if self.microbatch.old_logprobs is None:
            first = replace(self.microbatch, old_logprobs=self.outputs.values.detach())
            object.__setattr__(self, "microbatch", first)

    @property
    def logprobs(self) -> Tensor:
        """The policy's log-probs, [T], with a gradient."""
        return self.outputs.values

    @property
    def old_logprobs(self) -> Tensor:
        """The log-probs of the policy before the step's first update, [T]; or the engine's, where these are known."""
        kept, known = self.microbatch.old_logprobs, self.microbatch.engine_logprobs
        assert kept is not None
        if self.correction is None or self.correction.old_logprobs == "trainer":
            return kept
        return torch.where(known.isnan(), kept, known)

    @property
    def ratio(self) -> Tensor:
        """The probability of each token over that of the old policy, [T], with a gradient; see `bounded_exp`."""
        return bounded_exp(self.logprobs - self.old_logprobs)

    def corrected(self, coefficients: Tensor) -> Tensor:
        """Returns the coefficients [T], times the weights that correct for where the samples come from."""
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
        """Returns the loss with its own metrics and with those that every policy has, detached."""
        metrics = metrics | {"loss": loss} | engine_mismatch(self.microbatch, self.batch)
        if self.correction is not None:
            metrics |= correction_metrics(self.microbatch, self.batch, self.correction)
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})


def engine_mismatch(microbatch: Microbatch, batch: Batch) -> dict[str, Tensor]:
    """Measures how far the trainer's log-probs of the sampled tokens, before its update, are from the engine's.

    With d = trainer - engine a token, in nats: "mismatch" is the mean of |d|, "mismatch_max" its maximum,
    "mismatch_ratio" the mean of exp|d|. "mismatch_kl_k1" (mean of -d) and "mismatch_kl_k3" (mean of exp(d) - d - 1)
    estimate KL(engine || trainer) without bias. Both sides are log-probs of the distribution at the rollout's
    temperature before top_p and top_k, which is the one that was sampled from where neither truncates it.
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
