"""Plans blocks of tokens over the whole vocabulary, for half-precision products: how many, and how many are kept.

A block of t tokens and V columns holds 2 t V bytes: exp(z - shift) in bfloat16 after the forward pass, and in the same
memory the gradient of the logits in the backward pass. Only one tile of columns of the float32 logits exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil

import torch
from torch import Tensor

from megatron_oreal.kernels.tiles import slices
from megatron_oreal.kernels.torch_rows import Exponentials

TOKEN_ALIGNMENT = 128  # of blocks: rows of a tile of a matrix product
COLUMN_ALIGNMENT = 256  # of tiles of logits
ROW_ALIGNMENT = 64  # elements: alignment of a block's rows for aligned loads by the products
WAVE_COLUMNS = 64  # per multiprocessor: 4 row tiles of 128 x 33 column tiles of 256 give each of 132 one tile
TILE_BYTES = 160 * 2**20  # of a tile's float32 logits, at most
MOST_BLOCKS = 512
# The choice between more blocks and more recomputation assumes these rates, which are measured on an H200.
OPERATIONS_PER_SECOND = 800e12
BYTES_PER_SECOND = 4e12


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """The sizes of the call for which a plan is made; all tensor-parallel ranks have the same."""

    tokens: int
    columns: int  # of this rank, with padding
    hidden: int
    total_bytes: int  # of blocks and of what one block takes beside them
    fixed_bytes: int  # of the gradients of a block, for any number of tokens
    token_bytes: int  # of the gradients of a block, a token
    weight_bytes: int  # of one number of the weight's gradient
    num_processors: int  # multiprocessors of the GPU
    keeps: bool  # blocks are kept from the forward to the backward pass; without it, one block exists at a time

    def num_fitting(self, block: int) -> int:
        """Returns how many blocks of `block` tokens fit into memory beside a tile of logits or a block's gradients."""
        tile = min(4 * block * self.columns, max(TILE_BYTES, 4 * block * COLUMN_ALIGNMENT))
        left = self.total_bytes - max(tile, self.fixed_bytes + self.token_bytes * block)
        return max(0, left // (2 * block * self.columns))


@dataclass(frozen=True, slots=True)
class BlockPlan:
    tokens: tuple[slice, ...]
    num_kept: int  # of the blocks, the first ones
    tile_columns: int

    def columns(self, num_columns: int) -> list[slice]:
        return slices(num_columns, self.tile_columns)

    def seconds(self, sizes: BlockSizes) -> float:
        """Estimates the time beyond three products: repeated products, and repeated sums of the weight's gradient."""
        weight = sizes.columns * sizes.hidden
        again = sum(rows.stop - rows.start for rows in self.tokens[self.num_kept :]) if sizes.keeps else 0
        num_sums = max(0, len(self.tokens) - 1)
        return (
            2 * again * weight / OPERATIONS_PER_SECOND + num_sums * 2 * sizes.weight_bytes * weight / BYTES_PER_SECOND
        )

    @staticmethod
    @cache
    def choose(sizes: BlockSizes) -> BlockPlan:
        """Returns the cheapest plan over all numbers of equal blocks; the smallest blocks if not even one fits."""
        most = min(MOST_BLOCKS, ceil(sizes.tokens / TOKEN_ALIGNMENT))
        blocks = {aligned(ceil(sizes.tokens / number)) for number in range(1, most + 1)} | {TOKEN_ALIGNMENT}
        plans = [BlockPlan.of(sizes, block) for block in sorted(blocks, reverse=True) if sizes.num_fitting(block)]
        if not plans:
            return BlockPlan.of(sizes, TOKEN_ALIGNMENT)
        return min(plans, key=lambda plan: plan.seconds(sizes))

    @staticmethod
    def of(sizes: BlockSizes, block: int) -> BlockPlan:
        """Plans blocks of `block` tokens and keeps as many as fit; the blocks then grow to use the remaining memory."""
        num_blocks = ceil(sizes.tokens / block)
        num_kept = min(num_blocks, sizes.num_fitting(block)) if sizes.keeps else 0
        while 0 < num_kept < num_blocks and sizes.num_fitting(block + TOKEN_ALIGNMENT) >= num_kept:
            block += TOKEN_ALIGNMENT
        tokens = tuple(slices(sizes.tokens, block))
        return BlockPlan(tokens, min(num_kept, len(tokens)), tile_columns(block, sizes.num_processors))


def aligned(num_tokens: int) -> int:
    return ceil(num_tokens / TOKEN_ALIGNMENT) * TOKEN_ALIGNMENT


def tile_columns(block: int, num_processors: int) -> int:
    """Returns the columns of a tile of logits; if possible, its product keeps all multiprocessors busy to the end."""
    columns, wave = TILE_BYTES // (4 * block), WAVE_COLUMNS * num_processors
    step = wave if columns >= wave else COLUMN_ALIGNMENT
    return max(COLUMN_ALIGNMENT, columns // step * step)


class Block:
    """The exponentials of a block's tiles; the backward pass overwrites them with the gradients."""

    def __init__(self, num_tokens: int, columns: list[slice], device: torch.device) -> None:
        self.num_tokens, self.columns = num_tokens, columns
        width = columns[-1].stop if columns else 0
        shape = (padded(num_tokens), padded(width))
        self.memory = torch.empty(shape, dtype=torch.bfloat16, device=device)
        counts = [Exponentials.num_shifts(part.stop - part.start) for part in columns]
        self.shifts = torch.empty(num_tokens, sum(counts), dtype=torch.float32, device=device).split(counts, dim=1)
        self.values = self.memory[:num_tokens, :width]

    def tiles(self) -> Iterator[tuple[slice, Exponentials]]:
        for columns, shifts in zip(self.columns, self.shifts, strict=True):
            yield columns, Exponentials(self.values[:, columns], shifts)

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """Returns a tensor [t, v] of this half-precision dtype in the memory of the exponentials."""
        return self.memory.view(dtype)[: self.num_tokens, : self.values.shape[1]]


def padded(size: int) -> int:
    return ceil(size / ROW_ALIGNMENT) * ROW_ALIGNMENT
