"""Token losses and their parts. Every sum is divided by a global count, so micro-batches and ranks simply add up."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs


def kl_k3(logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = target - logprobs: the low-variance estimate of KL(policy || target) a token, in nats."""
    difference = target_logprobs - logprobs
    return difference.exp() - difference - 1.0


def kl_mse(logprobs: Tensor, target_logprobs: Tensor) -> Tensor:
    """d^2 / 2 a token: the same to second order, and its gradient estimates that of the KL without bias."""
    return 0.5 * (target_logprobs - logprobs).square()


# One token that the trainer finds impossible must not make a metric infinite: that would stop the run.
MAX_LOG_RATIO = 20.0
KL_KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k3": kl_k3, "mse": kl_mse}


def sequence_mean(values: Tensor, microbatch: Microbatch) -> Tensor:
    """Mean over the trained tokens of each sequence: [T] -> [N]; 0 for a sequence without any."""
    selected = torch.where(microbatch.loss_mask, values, 0.0)
    zeros = torch.zeros(microbatch.num_sequences, dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, microbatch.sequence_ids, selected)
    return sums / trained_tokens(microbatch).clamp_min(1)


def trained_tokens(microbatch: Microbatch) -> Tensor:
    """[N] trained tokens of each sequence."""
    zeros = torch.zeros(microbatch.num_sequences, dtype=torch.int64, device=microbatch.loss_mask.device)
    return zeros.index_add(0, microbatch.sequence_ids, microbatch.loss_mask.long())


def outcome_cross_entropy(scores: Tensor, microbatch: Microbatch, num_sequences: int) -> LossOutput:
    """OREAL eq. 12: binary cross entropy of each sequence's mean score with its outcome. scores: [T]."""
    logits = sequence_mean(scores, microbatch)
    trained = trained_tokens(microbatch) > 0  # not the filler
    labels = microbatch.is_correct.to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    loss = torch.where(trained, losses, 0.0).sum() / num_sequences
    right = ((logits > 0) == microbatch.is_correct) & trained
    return LossOutput(loss, {"loss": loss.detach(), "accuracy": right.sum() / num_sequences})


def cross_entropy(outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
    """Mean negative log-prob of the trained tokens."""
    loss = -outputs.values.index_select(0, microbatch.trained).sum() / batch.num_tokens
    return LossOutput(loss, {"loss": loss.detach(), "entropy": mean_entropy(outputs, batch).detach()})


def mean_entropy(outputs: TokenOutputs, batch: Batch) -> Tensor:
    """This micro-batch's share of the mean entropy over trained tokens, in nats."""
    assert outputs.entropy is not None
    return outputs.entropy.sum() / batch.num_tokens


def engine_mismatch(microbatch: Microbatch, batch: Batch) -> dict[str, Tensor]:
    """How far the trainer's log-probs of the sampled tokens, before its update, are from those of the engine.

    With d = trainer - engine a token, in nats: "mismatch" is the mean of |d|, "mismatch_max" its maximum,
    "mismatch_ratio" the mean of exp|d|. "mismatch_kl_k1" (mean of -d) and "mismatch_kl_k3" (mean of exp(d) - d - 1)
    estimate KL(engine || trainer) without bias; both are those of the untempered, untruncated distributions.
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


def importance_weights(microbatch: Microbatch, cap: float) -> Tensor:
    """[T], detached: min(pi_old / pi_engine, cap) of each trained token, 1 elsewhere.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"): corrects for samples of other weights, or of other kernels, than those that are trained.
    """
    weights = torch.ones_like(microbatch.engine_logprobs)
    ratios = log_ratio_to_engine(microbatch).exp().clamp_max(cap).to(weights.dtype)
    return weights.index_copy_(0, microbatch.trained, ratios)


def importance_metrics(microbatch: Microbatch, batch: Batch, cap: float) -> dict[str, Tensor]:
    """The mean of the weights as they are used, the largest before the cap, the share of tokens that it cuts."""
    ratio = log_ratio_to_engine(microbatch).exp()
    return {
        "importance_mean": ratio.clamp_max(cap).sum() / batch.num_tokens,
        "importance_max": largest(ratio),
        "importance_capped_share": (ratio > cap).sum() / batch.num_tokens,
    }


def log_ratio_to_engine(microbatch: Microbatch) -> Tensor:
    """[trained tokens] log(pi_old / pi_engine) in nats; 0 where the engine's log-prob is not known."""
    assert microbatch.old_logprobs is not None, "the first pass fills them"
    known = microbatch.engine_logprobs.index_select(0, microbatch.trained)
    difference = microbatch.old_logprobs.index_select(0, microbatch.trained) - known
    return torch.where(known.isnan(), 0.0, difference).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def largest(values: Tensor) -> Tensor:
    return values.max() if values.numel() else values.new_zeros(())
