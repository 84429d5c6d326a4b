"""Runs linear_logprob's passes over blocks of tokens, for half-precision products on a GPU.

forward   computes a tile's logits in float32; one pass reduces them, and writes exp(z - shift) in bfloat16 if kept
backward  overwrites the exponentials with d loss / d logits, then computes one product for the hidden states and one
          for the weight; first recomputes a block that was not kept, with the same bits
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_oreal.kernels.blocks import Block, BlockPlan, BlockSizes
from megatron_oreal.kernels.gradients import GradientSums
from megatron_oreal.kernels.products import Products
from megatron_oreal.kernels.vocabulary_reduction import BlockGradients, Call, Upstream


class BlockPasses:
    def __init__(
        self,
        call: Call,
        gradients: BlockGradients,
        hidden: Tensor,
        weight: Tensor,
        is_eager: bool,
        keeps: bool,
    ) -> None:
        """`is_eager`: each block completes both passes before the next begins; `keeps`: a backward pass follows."""
        self.call, self.gradients, self.keeps = call, gradients, keeps
        self.plan = BlockPlan.choose(sizes_of(call, gradients, hidden, weight, keeps=keeps and not is_eager))
        self.num_kept = 1 if is_eager else self.plan.num_kept
        self.tokens = self.plan.tokens
        self.columns = self.plan.columns(call.used_columns(weight))
        self.kept: dict[int, Block] = {}  # by the first token

    def reduce(self, hidden: Tensor, weight: Tensor, target: Tensor, rows: slice) -> Tensor:
        """Returns the reduction [3 or 4, t] (see torch_rows) of these tokens."""
        keeps = self.keeps and len(self.kept) < self.num_kept
        block = self._new_block(hidden[rows]) if keeps else None
        if block is not None:
            self.kept[rows.start] = block
        return self._reduce(hidden[rows], weight, target[rows], block, self.call.with_entropy)

    def add_gradients(
        self, sums: GradientSums, hidden: Tensor, weight: Tensor, upstream: Upstream, rows: slice
    ) -> None:
        """Adds the gradients of these tokens; callers pass the rows in order. `upstream` covers all tokens."""
        part, used = upstream.part(rows), self.call.used_columns(weight)
        block = self.kept.pop(rows.start, None)
        if block is None:
            block = self._new_block(hidden[rows])
            self._reduce(hidden[rows], weight, part.target, block, with_entropy=False)
        of_rows = None
        if sums.of_hidden is not None:
            make = torch.empty if self.columns else torch.zeros
            of_rows = make(hidden[rows].shape, dtype=torch.float32, device=hidden.device)
        if self.columns:
            of_weight = None if sums.of_weight is None else sums.of_weight[:used]
            accumulate = sums.accumulates(rows)
            self.gradients.add(
                self.call, block, part, hidden[rows], weight[:used], of_rows, of_weight, accumulate=accumulate
            )
        del block  # frees its memory before the next block is allocated
        if of_rows is not None:
            sums.store_hidden(rows, of_rows)

    def end_block(self) -> None:
        """Does nothing after both passes over these tokens: a block that is not kept is free already."""

    def end_pass(self) -> None:
        """Does nothing, because this class holds kept blocks only."""

    def _new_block(self, hidden: Tensor) -> Block:
        return Block(len(hidden), self.columns, hidden.device)

    def _reduce(
        self, hidden: Tensor, weight: Tensor, target: Tensor, block: Block | None, with_entropy: bool
    ) -> Tensor:
        call, parts = self.call, []
        kept = {columns.start: tile for columns, tile in block.tiles()} if block is not None else {}
        for columns in self.columns:
            logits = call.products.logits(hidden, weight[columns])
            place = call.place(target, columns)
            parts.append(call.rows.reduce_rows(logits, *place, call.temperature, with_entropy, kept.get(columns.start)))
            del logits  # before the next tile is made
        return call.merged(parts, target)


def sizes_of(call: Call, gradients: BlockGradients, hidden: Tensor, weight: Tensor, keeps: bool) -> BlockSizes:
    fixed_bytes, token_bytes = gradients.memory(weight)
    grad = weight if call.fused_weight is None else call.fused_weight.main_grad  # type: ignore[attr-defined]
    is_cuda = hidden.is_cuda
    return BlockSizes(
        tokens=len(hidden),
        columns=len(weight),
        hidden=hidden.shape[1],
        total_bytes=call.memory_bytes,
        fixed_bytes=fixed_bytes,
        token_bytes=token_bytes,
        weight_bytes=grad.dtype.itemsize,
        num_processors=torch.cuda.get_device_properties(hidden.device).multi_processor_count if is_cuda else 1,
        keeps=keeps,
    )


class HalfPrecisionGradients:
    """Computes the gradients of logits in half precision, and their two products."""

    def __init__(self, products: Products, dtype: torch.dtype) -> None:
        self.products, self.dtype = products, dtype

    def memory(self, weight: Tensor) -> tuple[int, int]:
        return 0, 4 * weight.shape[1]  # the float32 gradient of a hidden state

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
        gradient = block.gradient(self.dtype)
        for columns, tile in block.tiles():
            place = call.place(upstream.target, columns)
            call.rows.gradient_of_kept(
                tile, *place, upstream.logsumexp, upstream.entropy, upstream.scales, gradient[:, columns]
            )
        if of_hidden is not None:
            self.products.grad_hidden(gradient, weight, of_hidden, accumulate=False)
        if of_weight is not None:
            self.products.grad_weight(gradient, hidden, of_weight, accumulate=accumulate)
