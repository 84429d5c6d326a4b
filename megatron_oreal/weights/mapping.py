"""Maps a Megatron parameter to its Hugging Face tensors by rows of a table and invertible operations.

This is pure tensor code, without collectives, files or models. An operation works on a tensor-parallel shard exactly as
on the whole tensor. To read, rank r of R takes the r-th of R equal slices of every Hugging Face tensor along `axis`
and merges those; to write, it splits its shard, and the slices of all ranks are concatenated along `axis`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the tables are read on machines without torch
    from torch import Tensor


class Op(Protocol):
    """An invertible operation on tensors; tensor parallelism slices the Hugging Face tensors along `axis`.

    Where `axis` is None, every rank has the whole tensor.
    """

    @property
    def axis(self) -> int | None: ...

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Makes Megatron's parameter (whole or shard) of the Hugging Face tensors (whole or slices)."""
        ...

    def split(self, parameter: Tensor) -> list[Tensor]:
        """Undoes `merge`."""
        ...

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        """Returns the rank's part of Megatron's whole parameter, as a view where it is in one piece."""
        ...


@dataclass(frozen=True, slots=True)
class Direct:
    """Megatron and Hugging Face have the same tensor, under different names."""

    axis: int | None = None

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def split(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        return slice_along(parameter, self.axis, rank, size)


@dataclass(frozen=True, slots=True)
class Qkv:
    """Megatron interleaves q, k and v by key/value group: each group has its q heads, then its k, then its v."""

    queries_per_group: int
    head_dim: int
    axis: int | None = 0

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        query, key, value = tensors
        groups, rest = key.shape[0] // self.head_dim, key.shape[1:]
        parts = (
            query.reshape(groups, self.queries_per_group * self.head_dim, *rest),
            key.reshape(groups, self.head_dim, *rest),
            value.reshape(groups, self.head_dim, *rest),
        )
        return torch.cat(parts, dim=1).reshape(-1, *rest)

    def split(self, parameter: Tensor) -> list[Tensor]:
        rest = parameter.shape[1:]
        per_group = parameter.reshape(-1, (self.queries_per_group + 2) * self.head_dim, *rest)
        sizes = [self.queries_per_group * self.head_dim, self.head_dim, self.head_dim]
        return [part.reshape(-1, *rest) for part in per_group.split(sizes, dim=1)]

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        return slice_along(parameter, self.axis, rank, size)  # its groups are whole


@dataclass(frozen=True, slots=True)
class GateUp:
    """Megatron stores the gate's rows above those of the up projection; a shard holds its slice of each."""

    axis: int | None = 0

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        import torch

        return torch.cat(list(tensors), dim=0)

    def split(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(2, dim=0))

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        if size == 1:
            return parameter
        return self.merge([slice_along(half, self.axis, rank, size) for half in self.split(parameter)])


@dataclass(frozen=True, slots=True)
class Place:
    """Says which of a row's parameters is meant: its layer and expert, counted from 0 over the whole model.

    Example: the third expert of the first layer is Place(layer=0, expert=2); the embedding is Place().
    """

    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A kind of parameter, such as the attention output of every layer, with its names on both sides.

    `{layer}` and `{expert}` in a name stand for their numbers. Example: Row("decoder.final_layernorm.weight",
    ("model.norm.weight",), Direct(), (hidden_size,)).
    """

    megatron: str
    hf: tuple[str, ...]
    op: Op
    shape: tuple[int, ...]  # of Megatron's whole parameter, without the padding
    pads_vocabulary: bool = False  # Megatron's parameter ends with rows of zeros, so that the ranks' shards are equal
    exported: bool = True  # False: Megatron's second copy of a tensor that another row exports

    def hf_names(self, place: Place) -> list[str]:
        return [name.format(layer=place.layer, expert=place.expert) for name in self.hf]

    def megatron_name(self, place: Place) -> str:
        return self.megatron.format(layer=place.layer, expert=place.expert)

    def hf_shapes(self) -> list[tuple[int, ...]]:
        import torch

        return [tuple(part.shape) for part in self.op.split(torch.empty(self.shape, device="meta"))]


def places(row: Row, num_layers: int, num_experts: int) -> Iterator[Place]:
    """Yields the place of each parameter of a row, in order."""
    for layer in range(num_layers) if "{layer}" in row.megatron else [None]:
        for expert in range(num_experts) if "{expert}" in row.megatron else [None]:
            yield Place(layer, expert)


def slice_along(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    return tensor if axis is None else tensor.chunk(size, dim=axis)[rank]


def padded_vocabulary(vocab_size: int, tensor_size: int) -> int:
    return -(-vocab_size // tensor_size) * tensor_size


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    import torch

    padding = tensor.new_zeros(num_rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding]) if len(padding) else tensor


def rows_of_rank(num_rows: int, padded_rows: int, rank: int, size: int) -> slice:
    """Returns the rows that a rank reads of a tensor of `num_rows`, which is padded with zeros up to `padded_rows`."""
    length = padded_rows // size
    return slice(rank * length, min((rank + 1) * length, num_rows))


LAYER_NUMBER, EXPERT_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+"), re.compile(r"(?<=\.local_experts\.)\d+")


def find_row(rows: Sequence[Row], megatron_name: str) -> tuple[Row, Place]:
    """Finds the row and the place of a parameter such as decoder.layers.3.mlp.linear_fc2.weight.

    Raises ValueError for a parameter that no row knows.
    """
    layer, expert = LAYER_NUMBER.search(megatron_name), EXPERT_NUMBER.search(megatron_name)
    pattern = EXPERT_NUMBER.sub("{expert}", LAYER_NUMBER.sub("{layer}", megatron_name))
    for row in rows:
        if row.megatron == pattern:
            return row, Place(int(layer[0]) if layer else None, int(expert[0]) if expert else None)
    raise ValueError(f"model.path: no mapping for Megatron's parameter {megatron_name}")
