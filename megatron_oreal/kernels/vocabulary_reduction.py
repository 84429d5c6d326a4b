"""Reduces tiles of logits to log-sum-exp, target logit and entropy, merges reductions, and describes a call."""

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
from megatron_oreal.kernels.blocks import Block
from megatron_oreal.kernels.products import Products
from megatron_oreal.kernels.tiles import ALIGNMENT
from megatron_oreal.kernels.torch_rows import Exponentials


class RowKernels(Protocol):
    """The functions of torch_rows, which documents them, or of triton_rows."""

    def reduce_rows(
        self,
        logits: Tensor,
        target: Tensor,
        num_valid: int,
        temperature: float,
        with_entropy: bool,
        kept: Exponentials | None = None,
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

    def gradient_of_kept(
        self,
        kept: Exponentials,
        target: Tensor,
        num_valid: int,
        logsumexp: Tensor,
        entropy: Tensor | None,
        scales: Tensor,
        out: Tensor,
    ) -> None: ...

    def fp8_gradient_of_kept(
        self,
        kept: Exponentials,
        target: Tensor,
        num_valid: int,
        logsumexp: Tensor,
        entropy: Tensor | None,
        scales: Tensor,
        bounds: Tensor,
        out: Tensor,
        transposed: Tensor,
    ) -> None: ...

    def cast_transpose(self, matrix: Tensor, factors: Tensor | None, scale: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class Upstream:
    """Holds the inputs of the gradient of t tokens' logits, besides the logits."""

    target: Tensor  # [t]
    logsumexp: Tensor  # [t], of all columns of all ranks
    entropy: Tensor | None  # [t]; None: nothing comes from the entropy
    scales: Tensor  # [3, t]: of the target's one-hot, of the probabilities, of d entropy / d logits

    def part(self, rows: slice) -> Upstream:
        entropy = None if self.entropy is None else self.entropy[rows]
        return Upstream(self.target[rows], self.logsumexp[rows], entropy, self.scales[:, rows])


class BlockGradients(Protocol):
    """Computes the gradients of a block's logits from its exponentials, and their products; one object per call."""

    def memory(self, weight: Tensor) -> tuple[int, int]:
        """Returns (bytes of any block, bytes for each of its tokens), besides the block and a tile of its logits."""
        ...

    def add(
        self,
        call: Call,
        block: Block,
        upstream: Upstream,
        hidden: Tensor,  # [t, H]
        weight: Tensor,  # [v, H], the columns of the block
        of_hidden: Tensor | None,  # [t, H] float32, to be overwritten
        of_weight: Tensor | None,  # [v, H], float32 or half precision
        accumulate: bool,  # add to of_weight; else overwrite it
    ) -> None: ...


@cache
def row_kernels(device_type: str) -> RowKernels:
    if device_type == "cuda" and find_spec("triton"):
        from megatron_oreal.kernels import triton_rows

        return triton_rows
    return torch_rows


@dataclass(frozen=True, slots=True)
class Call:
    """Holds everything that describes a call of linear_logprob, except its tensors."""

    products: Products
    rows: RowKernels
    block_gradients: BlockGradients | None  # None: tiles of float32 logits, see tile_passes.py
    memory_bytes: int  # at most, beyond inputs and gradients
    group: dist.ProcessGroup | None  # None: this rank has the whole vocabulary
    first: int  # token id of this rank's first column
    num_valid: int  # of this rank's columns: the others are padding
    temperature: float
    with_entropy: bool
    fused_weight: Tensor | None  # has a main_grad, which takes its gradient
    with_placeholder: bool  # autograd gets an empty gradient where main_grad has it

    def used_columns(self, weight: Tensor) -> int:
        """Returns the number of columns with vocabulary, padded to a width at which the products are fast."""
        return min(len(weight), ceil(self.num_valid / ALIGNMENT) * ALIGNMENT)

    @property
    def num_numbers(self) -> int:
        return 4 if self.with_entropy else 3

    def place(self, target: Tensor, columns: slice) -> tuple[Tensor, int]:
        """Returns the targets as columns of a tile, and how many of the tile's columns are not padding."""
        return target - (self.first + columns.start), min(columns.stop, self.num_valid) - columns.start

    def reduce(self, tiles: Iterable[tuple[slice, Tensor]], target: Tensor) -> Tensor:
        """Reduces this rank's columns to [3 or 4, t] (see torch_rows), from the (columns, logits) of its tiles."""
        parts = []
        for columns, logits in tiles:
            parts.append(
                self.rows.reduce_rows(logits, *self.place(target, columns), self.temperature, self.with_entropy)
            )
            del logits  # before the next tile is made
        return self.merged(parts, target)

    def merged(self, parts: list[Tensor], target: Tensor) -> Tensor:
        """Returns the reduction [3 or 4, t] of all parts; without parts, that of zero columns."""
        if parts:
            return merge(parts)
        nothing = torch.zeros(self.num_numbers, len(target), dtype=torch.float32, device=target.device)
        nothing[[0, 2]] = -torch.inf
        return nothing

    def outputs(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns (logprobs, logsumexp, entropy or None), each [t], from this rank's [3 or 4, t] and the others'."""
        if self.group is not None:
            gathered = [torch.empty_like(numbers) for _ in range(self.group.size())]
            dist.all_gather(gathered, numbers, group=self.group)
            numbers = merge(gathered)
        maximum, total, target_logit, *weighted = numbers.unbind()
        log_total = total.log()
        logsumexp = maximum + log_total
        return target_logit - logsumexp, logsumexp, log_total - weighted[0] / total if weighted else None


def merge(parts: list[Tensor]) -> Tensor:
    """Returns the reduction [3 or 4, t] of the columns of all parts."""
    if len(parts) == 1:
        return parts[0]
    maximum, sums, target_logit, *weighted = torch.stack(parts).unbind(1)  # each [parts, t]
    overall = maximum.amax(dim=0)
    lower = maximum - overall
    scale = lower.exp()
    merged = [overall, (sums * scale).sum(0), target_logit.amax(0)]
    if weighted:
        # Finite, so that a part without columns adds 0 instead of 0 * -inf.
        merged.append(((weighted[0] + sums * lower.clamp_min(-1e30)) * scale).sum(0))
    return torch.stack(merged)
