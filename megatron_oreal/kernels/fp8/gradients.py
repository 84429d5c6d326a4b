"""Computes FP8 gradients of the logits: one kernel makes them, in both layouts, from a block's exponentials.

The magnitude of a token's gradient g is at most r, a bound that depends on the token's scales but not on the logits,
because |p - onehot| <= 1. So g 448 / r is rounded to e4m3, and each product multiplies the token's row by r / 448:

    d hidden[t] = (r_t / 448) sum_v e4m3[t, v] weight[v]
    d weight[v] = sum_t e4m3[t, v] (r_t / 448) hidden[t]

The weight and the scaled hidden states have one scale each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_oreal.kernels.blocks import TILE_BYTES, Block
from megatron_oreal.kernels.fp8.scaled import (
    ALIGNMENT,
    E4M3,
    E4M3_MAX,
    aligned,
    new_matrix,
    scale_of,
    scaled_product,
)
from megatron_oreal.kernels.tiles import slices
from megatron_oreal.kernels.torch_rows import Exponentials
from megatron_oreal.kernels.vocabulary_reduction import Call, Upstream

WEIGHT_BYTES = 128 * 2**20  # of quantised weights at a time
SUM_BYTES = 32 * 2**20  # of a product that is added to the weight's gradient afterwards
LARGEST_SURPRISE = 0.37  # p (logsumexp - z) <= 1 / e


class TorchFp8Gradients:
    """Multiplies with torch._scaled_mm. The e4m3 gradients overwrite the exponentials: they are half as large."""

    def __init__(self) -> None:
        self.weight_scale: Tensor | None = None  # of this call's weight

    def memory(self, weight: Tensor) -> tuple[int, int]:
        num_columns, width = weight.shape
        # The weight's gradient needs a tile's exponentials and transposed gradient, 3 bytes a logit, and a product.
        # The hidden states' needs some quantised columns; each token, its float32 gradient and a part of it in half.
        of_columns = min(WEIGHT_BYTES, num_columns * width)
        return max(of_columns, 3 * TILE_BYTES // 4 + SUM_BYTES), 6 * width

    def add(
        self,
        call: Call,
        block: Block,
        upstream: Upstream,
        hidden: Tensor,
        weight: Tensor,
        of_hidden: Tensor | None,
        of_weight: Tensor | None,
        accumulate: bool,
    ) -> None:
        factors = bounds_of(upstream) / E4M3_MAX
        columns_of = HiddenColumns(call, hidden, factors) if of_weight is not None else None
        gradient = self._gradient(call, block)
        for columns, tile in block.tiles():
            if columns.start == 0:  # the gradients of the other tiles end below their exponentials
                tile = Exponentials(tile.values.clone(), tile.shifts)
            transposed = new_matrix(columns.stop - columns.start, len(hidden), hidden.device)
            place = call.place(upstream.target, columns)
            call.rows.fp8_gradient_of_kept(
                tile,
                *place,
                upstream.logsumexp,
                upstream.entropy,
                upstream.scales,
                factors * E4M3_MAX,
                gradient[:, columns.start : columns.start + len(transposed)],
                transposed,
            )
            if of_weight is not None and columns_of is not None:
                columns_of.product(transposed, of_weight[columns], accumulate)
            del tile, transposed
        del columns_of  # before memory for the other product is made
        if of_hidden is not None:
            self._product_of_hidden(call, gradient, weight, of_hidden)
            of_hidden.mul_(factors[:, None])

    def _gradient(self, call: Call, block: Block) -> Tensor:
        """Returns [t, v] e4m3, aligned, in the first half of the rows of the block's memory."""
        num_tokens, num_columns = block.values.shape
        return block.memory.view(E4M3)[: aligned(num_tokens), : aligned(num_columns)]

    def _product_of_hidden(self, call: Call, gradient: Tensor, weight: Tensor, out: Tensor) -> None:
        """Computes out [t, H] = gradient @ weight, some columns at a time."""
        if self.weight_scale is None:
            self.weight_scale = scale_of(torch.linalg.vector_norm(weight, ord=torch.inf))
        num_columns, width = weight.shape
        step = max(ALIGNMENT, WEIGHT_BYTES // aligned(width) // ALIGNMENT * ALIGNMENT)
        for columns in slices(num_columns, step):
            part = new_matrix(width, columns.stop - columns.start, weight.device)
            call.rows.cast_transpose(weight[columns], None, self.weight_scale, part)
            left = gradient[:, columns.start : columns.start + part.shape[1]]
            # Rounding the product to bfloat16 halves its bytes; FP8's error is ten times as large as the rounding's.
            product = scaled_product(left, part, self.weight_scale, torch.bfloat16)[: len(out), :width]
            if columns.start:
                out.add_(product)
            else:
                out.copy_(product)
            del part, product  # before the next ones are made


class HiddenColumns:
    """A block's hidden states times their tokens' factors, quantised and transposed for a sum over tokens."""

    def __init__(self, call: Call, hidden: Tensor, factors: Tensor) -> None:
        num_tokens, self.width = hidden.shape
        largest = torch.linalg.vector_norm(hidden, ord=torch.inf, dim=1, dtype=torch.float32)
        self.scale = scale_of((largest * factors).amax())
        self.values = new_matrix(self.width, num_tokens, hidden.device)
        call.rows.cast_transpose(hidden, factors, self.scale, self.values)

    def product(self, transposed: Tensor, out: Tensor, accumulate: bool) -> None:
        """Computes out [v, H] = or += transposed [v, t] @ these hidden states."""
        if not accumulate and out.shape == (len(transposed), len(self.values)):
            scaled_product(transposed, self.values, self.scale, out.dtype, out=out)
            return
        rows_at_a_time = max(ALIGNMENT, SUM_BYTES // (2 * len(self.values)) // ALIGNMENT * ALIGNMENT)
        for rows in slices(len(transposed), rows_at_a_time):
            product = scaled_product(transposed[rows], self.values, self.scale, torch.bfloat16)
            part = out[rows]
            product = product[: len(part), : self.width]
            if accumulate:
                part.add_(product)
            else:
                part.copy_(product)


def bounds_of(upstream: Upstream) -> Tensor:
    """Returns positive bounds [t] in float32 on the magnitude of the gradients of each token's logits.

    That is onehot a + p b - p (z - logsumexp + entropy) c of a probability p, with the scales a, b and c.
    """
    onehot, probs, of_entropy = upstream.scales
    bounds = torch.maximum(torch.maximum(onehot.abs(), probs.abs()), (onehot + probs).abs())
    if upstream.entropy is not None:
        bounds = bounds + of_entropy.abs() * (LARGEST_SURPRISE + upstream.entropy)
    return bounds.clamp_min(torch.finfo(torch.float32).tiny * 2.0**20)
