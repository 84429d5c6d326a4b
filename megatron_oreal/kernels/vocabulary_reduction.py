"""Reduces tiles of logits to log-sum-exp, target logit and entropy, and merges the reductions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import ceil
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.kernels import torch_rows
from megatron_oreal.kernels.fp8.largest_logits import ExactLogits, LargestLogits
from megatron_oreal.kernels.gemms import Gemms
from megatron_oreal.kernels.tiles import ALIGNMENT, Compute, Sizes


class RowKernels(Protocol):
    """torch_rows, which documents them, or triton_rows."""

    def reduce_rows(
        self, logits: Tensor, target: Tensor, num_valid: int, temperature: float, with_entropy: bool
    ) -> Tensor: ...

    def gradient_rows(
        self,
        logits: Tensor,
        target: Tensor,
        num_valid: int,
        temperature: float,
        logsumexp: Tensor,
        entropy: Tensor | None,
        scales: Tensor,
        dtype: torch.dtype,
    ) -> Tensor: ...


@cache
def row_kernels(device_type: str) -> RowKernels:
    if device_type == "cuda" and find_spec("triton"):
        from megatron_oreal.kernels import triton_rows

        return triton_rows
    return torch_rows


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call is besides its tensors."""

    gemms: Gemms
    rows: RowKernels
    group: dist.ProcessGroup | None  # None: this rank has the whole vocabulary
    first: int  # token id of this rank's first column
    num_valid: int  # of this rank's columns: the others are padding
    temperature: float
    with_entropy: bool
    fused_weight: Tensor | None  # has a main_grad, which takes its gradient

    def sizes(self, hidden: Tensor, weight: Tensor) -> Sizes:
        memory, grad_dtype = self.gemms.memory(hidden, weight), self.gemms.grad_dtype
        return Sizes(
            tokens=len(hidden),
            columns=len(weight),
            used_columns=self.used_columns(weight),
            element_bytes=4 + (0 if grad_dtype is torch.float32 else grad_dtype.itemsize) + memory.element,
            token_bytes=4 * hidden.shape[1] + memory.token,
            column_bytes=memory.column,
            scratch_bytes=memory.scratch,
            held_bytes=memory.held,
            is_cuda=hidden.is_cuda,
        )

    def used_columns(self, weight: Tensor) -> int:
        """Those with vocabulary, and padding up to a width that the products like."""
        return min(len(weight), ceil(self.num_valid / ALIGNMENT) * ALIGNMENT)

    def compute(self, hidden: Tensor, weight: Tensor) -> Compute:
        return lambda rows, columns, out: self.gemms.logits(hidden[rows], weight[columns], out)

    @property
    def num_numbers(self) -> int:
        return 4 if self.with_entropy else 3

    def place(self, target: Tensor, columns: slice) -> tuple[Tensor, int]:
        """Of a tile: the targets as its columns, and how many columns are not padding."""
        return target - (self.first + columns.start), min(columns.stop, self.num_valid) - columns.start

    def reduce(
        self, tiles: Iterable[tuple[slice, Tensor]], hidden: Tensor, weight: Tensor, target: Tensor
    ) -> tuple[Tensor, ExactLogits]:
        """[3 or 4, t] (see torch_rows) of this rank's columns, from the (columns, logits) of its tiles.

        Beside it the logits that were computed again: in the backward pass too they take the tiles' place.
        """
        nothing = torch.zeros(self.num_numbers, len(target), dtype=torch.float32, device=target.device)
        nothing[[0, 2]] = -torch.inf
        largest = LargestLogits(self.gemms.num_exact, target, self.numbers_of)
        parts = []
        for columns, logits in largest.masked(tiles, self.num_valid):
            parts.append(
                self.rows.reduce_rows(logits, *self.place(target, columns), self.temperature, self.with_entropy)
            )
            del logits  # before the next tile is made
        exact = largest.computed(lambda columns: self.gemms.exact_logits(hidden, weight, columns))
        if exact.num_columns:
            parts += [*largest.others, self.numbers_of(exact.values)]
        numbers = merge(parts or [nothing])
        column = target - self.first
        is_here = (column >= 0) & (column < self.num_valid)
        of_target = self.gemms.exact_logits(hidden, weight, torch.where(is_here, column, 0)[:, None])
        if of_target is not None:
            numbers[2] = torch.where(is_here, of_target[:, 0] / self.temperature, -torch.inf)
        return numbers, exact

    def numbers_of(self, logits: Tensor) -> Tensor:
        """[3 or 4, t] of logits [t, k] of any columns, without a target."""
        nowhere = torch.full((len(logits),), -1, device=logits.device)
        return self.rows.reduce_rows(logits, nowhere, logits.shape[1], self.temperature, self.with_entropy)

    def outputs(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(logprobs, logsumexp, entropy or None), each [t], from this rank's [3 or 4, t] and the others'."""
        if self.group is not None:
            gathered = [torch.empty_like(numbers) for _ in range(self.group.size())]
            dist.all_gather(gathered, numbers, group=self.group)
            numbers = merge(gathered)
        maximum, total, target_logit, *weighted = numbers.unbind()
        log_total = total.log()
        logsumexp = maximum + log_total
        return target_logit - logsumexp, logsumexp, log_total - weighted[0] / total if weighted else None


def merge(parts: list[Tensor]) -> Tensor:
    """[3 or 4, t] of the columns of all parts."""
    if len(parts) == 1:
        return parts[0]
    maximum, sums, target_logit, *weighted = torch.stack(parts).unbind(1)  # each [parts, t]
    overall = maximum.amax(dim=0)
    lower = maximum - overall
    scale = lower.exp()
    merged = [overall, (sums * scale).sum(0), target_logit.amax(0)]
    if weighted:
        # Finite: a part without columns adds 0, and not 0 * -inf.
        merged.append(((weighted[0] + sums * lower.clamp_min(-1e30)) * scale).sum(0))
    return torch.stack(merged)
