"""Sums the gradients of hidden states and weight over blocks of tokens, and hands them to autograd or main_grad."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.kernels.vocabulary_reduction import Call

# The most roundings in a bfloat16 sum over blocks: 12 give a relative error of 4e-3, 33 give 6e-3 and 64 give 8e-3.
MAX_ROUNDINGS = 12


class GradientSums:
    """The gradients of hidden and weight, summed over blocks of tokens; None if they are not needed."""

    def __init__(
        self, call: Call, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool], fused: bool, num_blocks: int
    ) -> None:
        """With `fused`, a weight's gradient is added to its main_grad, if it has one. `num_blocks`: of tokens."""
        self.call = call
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

    def accumulates(self, rows: slice) -> bool:
        """Returns whether the weight's gradient of these tokens is added to the existing sum or overwrites it."""
        return self.is_in_main_grad or rows.start > 0

    def store_hidden(self, rows: slice, of_rows: Tensor) -> None:
        """Stores the gradient of these tokens' hidden states. `of_rows` [t, H] float32 is this rank's part."""
        if self.of_hidden is not None:
            if self.call.group is not None:
                dist.all_reduce(of_rows, group=self.call.group)
            self.of_hidden[rows] = of_rows

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the gradients (of hidden, of weight) for autograd, after all tokens were added."""
        of_weight = self.of_weight
        if of_weight is not None and self.main_grad is not None:
            if not self.is_in_main_grad:
                self.main_grad.add_(of_weight)
            return self.of_hidden, mark_main_grad(self.call)
        return self.of_hidden, None if of_weight is None else of_weight.to(self.weight_dtype)


def mark_main_grad(call: Call) -> Tensor | None:
    """Marks that main_grad has the weight's gradient, and returns the gradient for autograd in its place.

    Megatron's hook then does not add autograd's gradient, unless the weight is tied to the embedding of the same stage
    (`zero_out_wgrad`): then it adds autograd's gradient, which is the embedding's part. With overlapped reduction, the
    hook also asserts that autograd has a gradient: the embedding's, or the placeholder.
    """
    assert call.fused_weight is not None
    call.fused_weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    if not call.with_placeholder or getattr(call.fused_weight, "zero_out_wgrad", False):
        return None
    return torch.empty_like(call.fused_weight)


def common_factor(grad_logprobs: Tensor, token_scale: Tensor) -> Tensor:
    """Returns c in grad_logprobs = c token_scale. Without such a c, raises ValueError; on an accelerator, c is NaN."""
    squares = token_scale.square().sum()
    factor = torch.where(squares > 0, (grad_logprobs * token_scale).sum() / squares, 0.0)
    scaled = factor * token_scale
    differs = (grad_logprobs - scaled).abs().amax() > 1e-4 * scaled.abs().amax() if len(scaled) else squares > 0
    if not differs.is_cuda and differs:
        raise ValueError("mode=eager: the gradient of logprobs is not a multiple of token_scale; use mode=recompute")
    return torch.where(differs, torch.nan, factor)
