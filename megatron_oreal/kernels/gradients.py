"""The backward pass of linear_logprob: gradients of hidden states and weight, tile by tile."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.kernels.vocabulary_reduction import _Call

# Of a sum over blocks of tokens in bfloat16: 12 make a relative error of 4e-3, 33 make 6e-3 and 64 make 8e-3.
MAX_ROUNDINGS = 12


class _Gradients:
    """Those of hidden and weight, summed over tiles; None where they are not needed."""

    def __init__(
        self, call: _Call, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool], fused: bool, num_blocks: int
    ) -> None:
        """`fused`: that of a weight with a main_grad is added to it. `num_blocks`: of tokens, calls of `add`."""
        self.call = call
        self.inputs = hidden, weight
        self.of_hidden = torch.zeros_like(hidden) if needed[0] else None
        self.of_weight: Tensor | None = None
        like: Tensor = weight if call.fused_weight is None else call.fused_weight.main_grad  # type: ignore[attr-defined]
        self.main_grad = like if fused and call.fused_weight is not None else None
        self.weight_dtype = like.dtype
        sums_apart = like.dtype.itemsize < 4 and num_blocks > MAX_ROUNDINGS
        self.is_in_main_grad = self.main_grad is not None and not sums_apart
        if needed[1] and self.is_in_main_grad:
            self.of_weight = like
        elif needed[1]:
            self.of_weight = torch.empty_like(like, dtype=torch.float32 if sums_apart else like.dtype)
            self.of_weight[call.used_columns(weight) if len(hidden) else 0 :] = 0.0  # the rest is overwritten

    def add(
        self,
        rows: slice,
        tiles: Iterable[tuple[slice, Tensor]],  # (columns, logits) of `rows`; the logits are used up
        target: Tensor,  # these are of `rows`: [t]
        logsumexp: Tensor,
        entropy: Tensor | None,
        scales: Tensor,  # [3, t]
    ) -> None:
        """All tiles of these tokens, which must come in order."""
        hidden, weight = self.inputs[0][rows], self.inputs[1]
        call = self.call
        of_rows = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        for columns, logits in tiles:
            place = call.place(target, columns)
            grad_logits = call.rows.gradient_rows(
                logits, *place, call.temperature, logsumexp, entropy, scales, call.gemms.grad_dtype
            )
            if self.of_hidden is not None:
                call.gemms.grad_hidden(grad_logits, weight[columns], of_rows, accumulate=columns.start > 0)
            if self.of_weight is not None:
                accumulate = self.is_in_main_grad or rows.start > 0
                call.gemms.grad_weight(grad_logits, hidden, self.of_weight[columns], accumulate=accumulate)
            del logits, grad_logits  # before the next tile is made
        if self.of_hidden is not None:
            if call.group is not None:
                dist.all_reduce(of_rows, group=call.group)
            self.of_hidden[rows] = of_rows

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """(of hidden, of weight), once all tokens were added; None for the weight if its main_grad has it now."""
        of_weight = self.of_weight
        if of_weight is not None and self.main_grad is not None:
            if not self.is_in_main_grad:
                self.main_grad.add_(of_weight)
            mark_main_grad(self.call)
            return self.of_hidden, None
        return self.of_hidden, None if of_weight is None else of_weight.to(self.weight_dtype)


def mark_main_grad(call: _Call) -> None:
    """Megatron's hook adds then only what autograd has, and only of a tied embedding: the embedding's part."""
    assert call.fused_weight is not None
    call.fused_weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]


def common_factor(grad_logprobs: Tensor, token_scale: Tensor) -> Tensor:
    """The number c in grad_logprobs = c token_scale; ValueError or, on an accelerator, NaN where there is none."""
    squares = token_scale.square().sum()
    factor = torch.where(squares > 0, (grad_logprobs * token_scale).sum() / squares, 0.0)
    scaled = factor * token_scale
    differs = (grad_logprobs - scaled).abs().amax() > 1e-4 * scaled.abs().amax() if len(scaled) else squares > 0
    if not differs.is_cuda and differs:
        raise ValueError("mode=eager: the gradient of logprobs is not a multiple of token_scale; use mode=recompute")
    return torch.where(differs, torch.nan, factor)
