"""The largest logits of each token: found among approximate ones, tile by tile, and computed again exactly, once.

While a tile is summed up its own largest are masked. Those of them that are not among the largest of all tiles come
back as they were, the others as exact ones: nothing is ever subtracted from a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.kernels.tiles import row_blocks

MASKED = -1e20  # finite: its exponential is 0, and 0 times it is no NaN
GROUP = 8  # columns whose maximum stands for them in the search
Tiles = Iterable[tuple[slice, Tensor]]  # (columns of this rank, logits [t, v])


@dataclass(frozen=True, slots=True)
class ExactLogits:
    """Those of t tokens that were computed again; k may be 0."""

    columns: Tensor  # [t, k] int32, of this rank
    values: Tensor  # [t, k] float32

    @property
    def num_columns(self) -> int:
        return self.columns.shape[1]

    def put_into(self, tiles: Tiles) -> Iterator[tuple[slice, Tensor]]:
        """The same tiles, with these logits in their places."""
        if self.num_columns == 0:
            yield from tiles
            return
        for columns, logits in tiles:
            local = self.columns.long() - columns.start
            inside = (local >= 0) & (local < logits.shape[1])
            local = torch.where(inside, local, 0)
            # Differences, because those of other tiles must change nothing, and which they are the host does not know.
            logits.scatter_add_(1, local, torch.where(inside, self.values - logits.gather(1, local), 0.0))
            yield columns, logits
            del logits  # before the next tile is made


class LargestLogits:
    """The `count` largest of each token among the tiles that have gone through `masked`."""

    def __init__(self, count: int, target: Tensor, numbers_of: Callable[[Tensor], Tensor]) -> None:
        """`target` [t]; `numbers_of`: torch_rows.reduce_rows of logits [t, k] without a target."""
        self.count, self.numbers_of = count, numbers_of
        self.columns = torch.empty(len(target), 0, dtype=torch.int32, device=target.device)
        self.values = torch.empty(len(target), 0, dtype=torch.float32, device=target.device)
        self.others: list[Tensor] = []  # numbers of what was masked and is not among the largest of all

    def masked(self, tiles: Tiles, num_valid: int) -> Iterator[tuple[slice, Tensor]]:
        """The same tiles, each without its largest while it is looked at. Columns from `num_valid` on are padding."""
        if self.count == 0:
            yield from tiles
            return
        for columns, logits in tiles:
            valid = logits[:, : num_valid - columns.start]
            found = largest_columns(valid, self.count)
            values = valid.gather(1, found)
            valid.scatter_(1, found, MASKED)
            yield columns, logits
            valid.scatter_(1, found, values)
            self._add((found + columns.start).int(), values)
            del logits, valid, found, values  # before the next tile is made

    def computed(self, compute: Callable[[Tensor], Tensor | None]) -> ExactLogits:
        """`compute`: the logits [t, k] of columns [t, k], which are then those of the largest."""
        values = compute(self.columns.long()) if self.columns.shape[1] else self.values
        assert values is not None
        return ExactLogits(self.columns, values)

    def _add(self, columns: Tensor, values: Tensor) -> None:
        """[t, k] of a tile."""
        columns = torch.cat([self.columns, columns], dim=1)
        values, order = torch.cat([self.values, values], dim=1).sort(dim=1, descending=True, stable=True)
        self.columns = columns.gather(1, order[:, : self.count])
        self.values = values[:, : self.count].clone()
        if values.shape[1] > self.count:
            self.others.append(self.numbers_of(values[:, self.count :]))


def largest_columns(logits: Tensor, count: int) -> Tensor:
    """[t, v] -> [t, min(count, v)]: the columns of each row's largest logits, in no order.

    Any of them is in one of the `count` groups of columns with the largest maxima: one pass over the logits finds
    those, and only their columns are sorted.
    """
    num_rows, num_columns = logits.shape
    num_groups = num_columns // GROUP
    if num_groups <= count:
        return logits.topk(min(count, num_columns), dim=1, sorted=False).indices
    grouped = num_groups * GROUP
    within = torch.arange(GROUP, device=logits.device)
    rest = torch.arange(grouped, num_columns, device=logits.device)
    found = torch.empty(num_rows, count, dtype=torch.int64, device=logits.device)
    # Of a row: the maxima, and of each candidate two columns in int64 and its logit.
    row_bytes = 4 * num_groups + 24 * (count + 1) * GROUP
    for rows in row_blocks(num_rows, row_bytes, logits.is_cuda):
        block = logits[rows]
        maxima = block[:, :grouped].unflatten(1, (num_groups, GROUP)).amax(2)
        groups = maxima.topk(count, dim=1, sorted=False).indices
        columns = (groups[:, :, None] * GROUP + within).flatten(1)
        columns = torch.cat([columns, rest.expand(len(block), -1)], dim=1)
        found[rows] = columns.gather(1, block.gather(1, columns).topk(count, dim=1, sorted=False).indices)
    return found
