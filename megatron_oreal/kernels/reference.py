"""Defines linear_logprob in plain torch, for tests and readers. It holds all logits, and accepts float64 too."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprob_reference(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [T]
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (logprobs[T], logsumexp[T], entropy[T]) of softmax(hidden @ weight.T / temperature), on one process."""
    logits = (hidden @ weight[:valid_vocab].T) / temperature
    logsumexp = torch.logsumexp(logits, dim=-1)
    logprobs = logits.gather(-1, target[:, None])[:, 0] - logsumexp
    probs = torch.softmax(logits, dim=-1)
    return logprobs, logsumexp, logsumexp - (probs * logits).sum(-1)
