"""Log-probs of target tokens from hidden states and a vocabulary-parallel head, in chunks of tokens.

The logits of one chunk at a time exist, in float32; the backward pass computes them again from the saved hidden states
and logsumexp. Each tensor-parallel rank reduces its own vocabulary slice to three numbers a token: maximum, sum of
exponentials, the target's logit; for the entropy also the sum of exponentials weighted by the logits. One all-gather
combines them, however many chunks there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 64 * 2**20  # float32 logits of one chunk
CUDA_CHUNK_BYTES = 1 * 2**30  # there each chunk also reads and writes the whole gradient of the weight
Precision = Literal["fp32", "bf16"]


def linear_logprob(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H], this rank's slice of the vocabulary
    target: Tensor,  # [T] int64, global token ids
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    entropy: bool = False,
    precision: Precision = "bf16",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprobs[T], logsumexp[T], entropy[T] or None) in float32 of softmax(hidden @ weight.T / temperature), in nats.

    All three are differentiable with respect to hidden and weight. Under tensor parallelism every rank passes the same
    hidden states and targets, and the gradient of hidden is the whole one. Columns from `valid_vocab` on (global count)
    are padding and have no probability. `precision="bf16"` multiplies half-precision inputs as they are; float32 inputs
    are always computed in float32. Raises ValueError for mismatched shapes or dtypes, a temperature or valid_vocab out
    of range, and targets outside the vocabulary.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    check_inputs(hidden, weight, target, tp_group, valid_vocab)
    if precision == "fp32":
        hidden, weight = hidden.float(), weight.float()
    outputs: tuple[Tensor, Tensor, Tensor | None] = _LinearLogprob.apply(
        hidden, weight, target, tp_group, temperature, valid_vocab, entropy
    )
    return outputs


def check_inputs(
    hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup | None, valid_vocab: int | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [V, H]")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must have one token id a row of hidden, {hidden.shape[0]}, got {tuple(target.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them")
    columns = weight.shape[0] * (group.size() if group else 1)
    vocabulary = columns if valid_vocab is None else valid_vocab
    if not 1 <= vocabulary <= columns:
        raise ValueError(f"valid_vocab must be in [1, {columns}], the columns of all ranks, got {vocabulary}")
    # On an accelerator the comparison would stall the queue: there a stray target gives -inf.
    if target.device.type == "cpu" and target.numel() and not 0 <= int(target.min()) <= int(target.max()) < vocabulary:
        raise ValueError(f"target must hold ids in [0, {vocabulary}), got [{int(target.min())}, {int(target.max())}]")


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        valid_vocab: int | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        first = weight.shape[0] * (group.rank() if group else 0)
        columns = local_columns(weight, first, valid_vocab)
        partial = torch.empty(4 if with_entropy else 3, len(target), dtype=torch.float32, device=hidden.device)
        for rows in chunks(hidden, weight.shape[0]):
            logits = chunk_logits(hidden[rows], weight, temperature, columns)
            partial[:, rows] = reduce_chunk(logits, target[rows] - first, columns, with_entropy)
        logprobs, logsumexp, entropy = combine(partial, group)
        ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
        ctx.group, ctx.temperature, ctx.columns, ctx.first = group, temperature, columns, first
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
        return logprobs, logsumexp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        grad_logprobs, grad_logsumexp, grad_entropy = grads
        onehot_scale = torch.zeros_like(logsumexp) if grad_logprobs is None else grad_logprobs
        probs_scale = -onehot_scale if grad_logsumexp is None else grad_logsumexp - onehot_scale
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in chunks(hidden, weight.shape[0]):
            logits = chunk_logits(hidden[rows], weight, ctx.temperature, ctx.columns)
            shifted = logits - logsumexp[rows, None]
            probs = shifted.exp()
            # d logprob = onehot - p, d logsumexp = p, d entropy = -p (z - logsumexp + entropy)
            grad_logits = probs * probs_scale[rows, None]
            if grad_entropy is not None:
                # Padding: 0 * -inf would be NaN.
                surprise = shifted.clamp_min(-1e4) + entropy[rows, None]
                grad_logits -= probs * surprise * grad_entropy[rows, None]
            local, inside = local_target(target[rows] - ctx.first, ctx.columns)
            grad_logits.scatter_add_(1, local[:, None], (onehot_scale[rows] * inside)[:, None])
            grad_logits = (grad_logits / ctx.temperature).to(weight.dtype)
            grad_hidden[rows] = (grad_logits @ weight).float()
            grad_weight += (grad_logits.T @ hidden[rows]).float()
        if ctx.group is not None:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None, None, None, None, None


def chunks(hidden: Tensor, num_columns: int) -> Iterator[slice]:
    size = max(1, (CUDA_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES) // (4 * num_columns))
    return (slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size))


def local_columns(weight: Tensor, first: int, valid_vocab: int | None) -> int:
    """How many of this rank's columns are vocabulary and not padding."""
    return weight.shape[0] if valid_vocab is None else max(0, min(weight.shape[0], valid_vocab - first))


def chunk_logits(hidden: Tensor, weight: Tensor, temperature: float, columns: int) -> Tensor:
    """[rows, V] float32; padding columns are -inf."""
    logits = (hidden @ weight.T).float()
    if temperature != 1.0:
        logits /= temperature
    logits[:, columns:] = -torch.inf
    return logits


def local_target(target: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Column of each target on this rank (0 where it is another rank's), and whether it is here."""
    inside = (target >= 0) & (target < columns)
    return torch.where(inside, target, 0), inside


def reduce_chunk(logits: Tensor, target: Tensor, columns: int, with_entropy: bool) -> Tensor:
    """[3, rows]: maximum, sum exp(z - maximum), the target's logit or -inf; a fourth: sum exp(z - maximum) z."""
    if columns == 0:
        nothing = torch.zeros(4 if with_entropy else 3, logits.shape[0], device=logits.device)
        nothing[[0, 2]] = -torch.inf
        return nothing
    logits = logits[:, :columns]
    maximum = logits.amax(dim=-1)
    exponentials = (logits - maximum[:, None]).exp()
    local, inside = local_target(target, columns)
    target_logit = torch.where(inside, logits.gather(1, local[:, None])[:, 0], -torch.inf)
    rows = [maximum, exponentials.sum(-1), target_logit]
    return torch.stack([*rows, (exponentials * logits).sum(-1)] if with_entropy else rows)


def combine(partial: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprobs, logsumexp, entropy or None), each [T], from every rank's [3 or 4, T]."""
    gathered = [partial]
    if group is not None and group.size() > 1:
        gathered = [torch.empty_like(partial) for _ in range(group.size())]
        dist.all_gather(gathered, partial, group=group)
    maximum, sums, target_logit, *weighted = torch.stack(gathered).unbind(1)  # each [ranks, T]
    overall = maximum.amax(dim=0)
    scale = (maximum - overall).exp()
    total = (sums * scale).sum(0)
    logsumexp = overall + total.log()
    entropy = logsumexp - (weighted[0] * scale).sum(0) / total if weighted else None
    return target_logit.amax(0) - logsumexp, logsumexp, entropy
