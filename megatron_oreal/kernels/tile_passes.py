"""Runs linear_logprob's passes over tiles of float32 logits: on a CPU, and for float32 inputs on a GPU.

The logits of as many first tiles as fit (tiles.py) are kept for the backward pass, which recomputes the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_oreal.kernels.gradients import GradientSums
from megatron_oreal.kernels.tiles import Compute, Sizes, TileLogits, Tiling
from megatron_oreal.kernels.vocabulary_reduction import Call, Upstream


class TilePasses:
    def __init__(self, call: Call, hidden: Tensor, weight: Tensor, is_eager: bool, keeps: bool) -> None:
        """`is_eager`: each row of tiles completes both passes before the next; `keeps`: a backward pass follows."""
        self.call = call
        sizes = sizes_of(call, hidden, weight)
        tiling = Tiling.eager(sizes) if is_eager else Tiling.square(sizes)
        kept_bytes = tiling.row_bytes if is_eager else sizes.kept_bytes
        self.logits = TileLogits(tiling, kept_bytes if keeps else 0, not hidden.is_cuda)
        self.tokens = tuple(tiling.tokens)

    def reduce(self, hidden: Tensor, weight: Tensor, target: Tensor, rows: slice) -> Tensor:
        """Returns the reduction [3 or 4, t] (see torch_rows) of these tokens."""
        return self.call.reduce(self.logits.first(rows, self._compute(hidden, weight)), target[rows])

    def add_gradients(
        self, sums: GradientSums, hidden: Tensor, weight: Tensor, upstream: Upstream, rows: slice
    ) -> None:
        """Adds the gradients of these tokens; callers pass the rows in order. `upstream` covers all tokens."""
        call, part = self.call, upstream.part(rows)
        of_rows = torch.zeros(hidden[rows].shape, dtype=torch.float32, device=hidden.device)
        for columns, logits in self.logits.again(rows, self._compute(hidden, weight)):
            place = call.place(part.target, columns)
            grad_logits = call.rows.gradient_rows(
                logits,
                *place,
                call.temperature,
                part.logsumexp,
                part.entropy,
                part.scales,
                call.products.grad_dtype,
            )
            if sums.of_hidden is not None:
                call.products.grad_hidden(grad_logits, weight[columns], of_rows, accumulate=columns.start > 0)
            if sums.of_weight is not None:
                accumulate = sums.accumulates(rows)
                call.products.grad_weight(grad_logits, hidden[rows], sums.of_weight[columns], accumulate=accumulate)
            del logits, grad_logits  # before the next tile is made
        sums.store_hidden(rows, of_rows)

    def end_block(self) -> None:
        """Releases the memory of these tokens for reuse, after both passes over them."""
        self.logits.forget()

    def end_pass(self) -> None:
        self.logits.end_pass()

    def _compute(self, hidden: Tensor, weight: Tensor) -> Compute:
        return lambda rows, columns, out: self.call.products.logits(hidden[rows], weight[columns], out)


def sizes_of(call: Call, hidden: Tensor, weight: Tensor) -> Sizes:
    grad_dtype, copied = call.products.grad_dtype, call.products.copied_bytes(hidden)
    return Sizes(
        tokens=len(hidden),
        columns=len(weight),
        used_columns=call.used_columns(weight),
        element_bytes=4 + (0 if grad_dtype is torch.float32 else grad_dtype.itemsize),
        token_bytes=4 * hidden.shape[1] + copied,
        column_bytes=copied,
        total_bytes=call.memory_bytes,
        is_cuda=hidden.is_cuda,
    )
