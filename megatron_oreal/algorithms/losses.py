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
    loss = -outputs.values[microbatch.loss_mask].sum() / batch.num_tokens
    return LossOutput(loss, {"loss": loss.detach(), "entropy": mean_entropy(outputs, batch).detach()})


def mean_entropy(outputs: TokenOutputs, batch: Batch) -> Tensor:
    """This micro-batch's share of the mean entropy over trained tokens, in nats."""
    assert outputs.entropy is not None
    return outputs.entropy.sum() / batch.num_tokens


def engine_mismatch(outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> dict[str, Tensor]:
    """How far the trainer's log-probs of the sampled tokens are from those that the generation engine reported."""
    difference = (outputs.values.detach() - microbatch.rollout_logprobs)[microbatch.loss_mask].abs()
    if not difference.numel():
        difference = outputs.values.new_zeros(1)
    return {"mismatch": difference.sum() / batch.num_tokens, "mismatch_max": difference.max()}
