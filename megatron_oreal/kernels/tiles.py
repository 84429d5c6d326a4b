"""Splits tokens x vocabulary into tiles within a bound of bytes, and manages the memory of the tiles' logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

# The bound for tiles, copies by the products and sums together. It excludes the libraries' own workspaces.
CPU_BYTES = 176 * 2**20
CUDA_BYTES = 1472 * 2**20
# The share of these bytes for logits that mode=recompute keeps until the backward pass. A GPU needs the rest for
# large tiles, because it multiplies small ones slowly.
CPU_KEPT_SHARE = 0.875
CUDA_KEPT_SHARE = 0.5
ALIGNMENT = 32  # of tiles, for the products: MXFP8 has one scale for as many numbers
LOGIT_BYTES = 4
# (tokens, columns, memory for the result or None) -> float32 logits [t, v], in that memory if the products can
Compute = Callable[[slice, slice, Tensor | None], Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of the call for which the tiles are chosen."""

    tokens: int
    columns: int
    used_columns: int  # the others, at the end, are padding
    element_bytes: int  # a logit and its gradient, with copies
    token_bytes: int  # the gradient's sum, and the copies of a hidden state
    column_bytes: int  # the copies of a column's weights
    total_bytes: int  # of all of these
    is_cuda: bool

    @property
    def kept_bytes(self) -> int:
        """Returns the bytes of the logits that mode=recompute keeps."""
        return int((CUDA_KEPT_SHARE if self.is_cuda else CPU_KEPT_SHARE) * self.total_bytes)

    @property
    def tile_bytes(self) -> int:
        """Returns the bytes of everything that belongs to one tile."""
        return self.total_bytes - self.kept_bytes


@dataclass(frozen=True, slots=True)
class Tiling:
    tokens: list[slice]  # the same on every rank, because the ranks run collectives for each
    columns: list[slice]  # empty if this rank has only padding

    @staticmethod
    def square(sizes: Sizes) -> Tiling:
        """Makes tiles as square as possible, which reads and writes the sums of gradients least often."""
        rows, columns = sizes.tokens, sizes.columns
        limit = sizes.tile_bytes
        while sizes.element_bytes * rows * columns + sizes.token_bytes * rows + sizes.column_bytes * columns > limit:
            if max(rows, columns) <= ALIGNMENT:
                break
            rows, columns = (aligned(rows / 2), columns) if rows >= columns else (rows, aligned(columns / 2))
        return Tiling(slices(sizes.tokens, rows), slices(sizes.used_columns, columns))

    @staticmethod
    def eager(sizes: Sizes) -> Tiling:
        """Returns the tiling that holds all logits of some tokens, and processes one tile of them at a time."""
        limit, columns = sizes.total_bytes, aligned(sizes.columns / 8)
        while sizes.column_bytes * columns > limit / 4 and columns > ALIGNMENT:
            columns = aligned(columns / 2)
        one_token = LOGIT_BYTES * sizes.columns + (sizes.element_bytes - LOGIT_BYTES) * columns + sizes.token_bytes
        rows = max(1, (limit - sizes.column_bytes * columns) // one_token // ALIGNMENT) * ALIGNMENT
        return Tiling(slices(sizes.tokens, rows), slices(sizes.used_columns, columns))

    @property
    def num_elements(self) -> int:
        """Returns the number of logits in the largest tile, which is the first."""
        return size_of(self.tokens[0], self.columns[0])

    @property
    def row_bytes(self) -> int:
        """Returns the bytes of the logits of a row of tiles."""
        return LOGIT_BYTES * sum(size_of(rows, columns) for rows in self.tokens[:1] for columns in self.columns)


class TileLogits:
    """The logits of a tiling's tiles; the first ones, as many as fit, are kept.

    On a CPU, two buffers hold the logits: one the kept ones, the other each further tile in turn. Separate allocations
    would fragment the memory, because no other tile fits into the space of a freed tile.
    """

    def __init__(self, tiling: Tiling, num_bytes: int, is_cpu: bool) -> None:
        """`num_bytes` is the memory for kept logits."""
        self.tiling, self.is_cpu = tiling, is_cpu
        num_elements = sum(size_of(rows, columns) for rows in tiling.tokens for columns in tiling.columns)
        self.room = self.num_free = min(num_bytes // LOGIT_BYTES, num_elements)
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.memory_of_kept: Tensor | None = None
        self.memory: Tensor | None = None  # of one tile

    def first(self, rows: slice, compute: Compute) -> Iterator[tuple[slice, Tensor]]:
        """Yields (columns, logits) of each tile of these tokens. Logits that are to be kept must stay as they are."""
        for columns in self.tiling.columns:
            size = size_of(rows, columns)
            is_kept = size <= self.num_free
            logits = compute(rows, columns, self._memory_for(rows, columns, is_kept))
            if is_kept:
                self.num_free -= size
                self.kept[rows.start, columns.start] = logits
            yield columns, logits
            del logits  # before the next tile is made

    def again(self, rows: slice, compute: Compute) -> Iterator[tuple[slice, Tensor]]:
        """Yields the tiles of `first` again: removes kept logits from the store, and recomputes the others."""
        for columns in self.tiling.columns:
            logits = self.kept.pop((rows.start, columns.start), None)
            if logits is None:
                logits = compute(rows, columns, self._memory_for(rows, columns, is_kept=False))
            yield columns, logits
            del logits

    def end_pass(self) -> None:
        """Frees the memory of logits that are not kept."""
        self.memory = None
        if not self.kept:
            self.memory_of_kept = None

    def forget(self) -> None:
        """Discards kept logits, so that their memory can be reused."""
        self.kept.clear()
        self.num_free = self.room

    def _memory_for(self, rows: slice, columns: slice, is_kept: bool) -> Tensor | None:
        if not self.is_cpu:
            return None
        size, shape = size_of(rows, columns), (rows.stop - rows.start, columns.stop - columns.start)
        if is_kept:
            if self.memory_of_kept is None:
                self.memory_of_kept = torch.empty(self.room, dtype=torch.float32)
            begin = self.room - self.num_free
            return self.memory_of_kept[begin : begin + size].view(shape)
        if self.memory is None:
            self.memory = torch.empty(self.tiling.num_elements, dtype=torch.float32)
        return self.memory[:size].view(shape)


def bytes_of_a_call(is_cuda: bool) -> int:
    return CUDA_BYTES if is_cuda else CPU_BYTES


def size_of(rows: slice, columns: slice) -> int:
    return (rows.stop - rows.start) * (columns.stop - columns.start)


def aligned(size: float) -> int:
    return max(1, ceil(size / ALIGNMENT)) * ALIGNMENT


def slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)] if total else []
