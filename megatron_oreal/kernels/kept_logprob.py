"""Computes log-probs within each row's set of kept tokens: those of the distribution after top_p and top_k.

    log p(y) = z_y - log sum_{k in kept} exp(z_k),   z = logits / temperature

The set does not change with the weights, so that the gradient is that of the truncated distribution: in expectation
over its samples, grad log p is 0. The module uses plain torch and processes one block of rows at a time: it is slower
than `linear_logprob`, and holds at most BLOCK_BYTES of logits in each buffer. Under tensor parallelism, every rank
computes with a block's logits of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.kernels.products import Products

BLOCK_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The kept tokens of T rows, row by row. Example: KeptTokens([2, 1], [5, 7, 0]) keeps 5 and 7, and then 0."""

    counts: Tensor  # [T] int64, at least 1
    ids: Tensor  # [sum of counts] int32

    def mask(self, rows: slice, num_columns: int) -> Tensor:
        """Returns a mask [t, V] (bool) of these rows' kept tokens."""
        counts = self.counts[rows]
        first = int(self.counts[: rows.start].sum())
        ids = self.ids[first : first + int(counts.sum())].long()
        mask = torch.zeros(len(counts), num_columns, dtype=torch.bool, device=ids.device)
        mask[torch.arange(len(counts), device=ids.device).repeat_interleave(counts), ids] = True
        return mask


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Computes logits from hidden states."""

    products: Products
    temperature: float
    num_valid: int  # columns of all ranks that are not padding
    group: dist.ProcessGroup | None = None  # the ranks that share the vocabulary; None: this one has all of it

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Returns logits [t, V] in float32, divided by the temperature, of the whole vocabulary."""
        own = self.products.logits(hidden, weight)
        if self.group is not None:
            parts = [torch.empty_like(own) for _ in range(self.group.size())]
            dist.all_gather(parts, own, group=self.group)
            own = torch.cat(parts, dim=1)
        return own[:, : self.num_valid] / self.temperature

    def own_columns(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Returns this rank's columns of [t, V], with zeros for padding."""
        first = len(weight) * (self.group.rank() if self.group is not None else 0)
        own = gradient[:, first : first + len(weight)]
        return torch.nn.functional.pad(own, (0, len(weight) - own.shape[1]))

    def blocks(self, num_rows: int) -> Iterator[slice]:
        size = max(1, BLOCK_BYTES // (4 * self.num_valid))
        return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


@torch.no_grad()
def choose_kept(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H], this rank's slice
    target: Tensor,  # [T] int64
    vocabulary: Vocabulary,
    truncate: Callable[[Tensor], Tensor],
) -> KeptTokens:
    """Keeps the tokens whose logits `truncate` leaves finite, and the target, which rounding can exclude.

    truncate: maps logits [t, V], divided by the temperature, to the same with -inf for tokens that are never sampled.
    """
    counts, ids = [], []
    for rows in vocabulary.blocks(len(target)):
        kept = truncate(vocabulary.logits(hidden[rows], weight)) > -torch.inf
        kept.scatter_(1, target[rows, None], True)
        counts.append(kept.sum(dim=1))
        ids.append(kept.nonzero()[:, 1].int())
    if not counts:
        return KeptTokens(target.new_zeros(0), target.new_zeros(0).int())
    return KeptTokens(torch.cat(counts), torch.cat(ids))


def kept_logprob(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H], this rank's slice
    target: Tensor,  # [T] int64, each among the kept ones
    kept: KeptTokens,
    vocabulary: Vocabulary,
) -> tuple[Tensor, Tensor]:
    """Returns (log-probs [T], entropy [T]) in float32 within the kept tokens, in nats; both are differentiable."""
    result: tuple[Tensor, Tensor] = _KeptLogprob.apply(hidden, weight, target, kept, vocabulary)  # type: ignore[no-untyped-call]
    return result


class _KeptLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, kept: KeptTokens, vocabulary: Vocabulary
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = (torch.zeros(len(target), device=hidden.device) for _ in range(2))
        for rows in vocabulary.blocks(len(target)):
            inside = within(vocabulary.logits(hidden[rows], weight), kept, rows)
            logprobs[rows] = inside.gather(1, target[rows, None])[:, 0]
            entropy[rows] = entropy_of(inside)
        ctx.save_for_backward(hidden, weight, target)
        ctx.kept, ctx.vocabulary = kept, vocabulary
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target = ctx.saved_tensors
        vocabulary: Vocabulary = ctx.vocabulary
        of_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        of_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in vocabulary.blocks(len(target)):
            inside = within(vocabulary.logits(hidden[rows], weight), ctx.kept, rows)
            probabilities = inside.exp()
            surprise = torch.where(probabilities > 0, inside, 0.0) + entropy_of(inside)[:, None]
            gradient = -probabilities * (of_logprobs[rows, None] + of_entropy[rows, None] * surprise)
            gradient.scatter_add_(1, target[rows, None], of_logprobs[rows, None])
            own = vocabulary.own_columns(gradient / vocabulary.temperature, weight)
            vocabulary.products.grad_hidden(own, weight, of_hidden[rows], accumulate=False)
            vocabulary.products.grad_weight(own, hidden[rows], of_weight, accumulate=True)
        if vocabulary.group is not None:
            dist.all_reduce(of_hidden, group=vocabulary.group)
        return of_hidden.to(hidden.dtype), of_weight.to(weight.dtype), None, None, None


def within(logits: Tensor, kept: KeptTokens, rows: slice) -> Tensor:
    """Returns log-probs [t, V] within the kept tokens, and -inf for the others."""
    return torch.log_softmax(logits.masked_fill(~kept.mask(rows, logits.shape[1]), -torch.inf), dim=1)


def entropy_of(inside: Tensor) -> Tensor:
    """Returns the entropy [t] of log-probs [t, V], some of which are -inf."""
    return -(inside.exp() * torch.where(inside > -torch.inf, inside, 0.0)).sum(dim=1)
