"""Rows that tie a Megatron parameter to its Hugging Face tensors, and the invertible operations between them.

Pure tensor code: no collectives, no files, no model. An operation works on a tensor-parallel shard exactly as on the
whole tensor: rank r of R takes the r-th of R equal slices of every Hugging Face tensor along `axis` and merges those,
and the other way round it splits its shard and the slices of all ranks are concatenated along `axis`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Op(Protocol):
    """`axis`: along which tensor parallelism slices the Hugging Face tensors; None: every rank has the whole."""

    @property
    def axis(self) -> int | None: ...

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors (whole or slices) -> Megatron's parameter (whole or shard)."""
        ...

    def split(self, parameter: Tensor) -> list[Tensor]:
        """The inverse of merge."""
        ...

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        """The rank's part of Megatron's whole parameter: a view where it is in one piece."""
        ...


@dataclass(frozen=True, slots=True)
class Direct:
    """The same tensor under another name."""

    axis: int | None = None

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def split(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        return slice_along(parameter, self.axis, rank, size)


@dataclass(frozen=True, slots=True)
class Qkv:
    """q, k and v interleaved by key/value group: [q heads of the group, k, v] for each group, weights and biases."""

    queries_per_group: int
    head_dim: int
    axis: int | None = 0

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
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
    """The gate's rows above the up projection's; a shard holds its slice of each."""

    axis: int | None = 0

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=0)

    def split(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(2, dim=0))

    def shard(self, parameter: Tensor, rank: int, size: int) -> Tensor:
        if size == 1:
            return parameter
        return self.merge([slice_along(half, self.axis, rank, size) for half in self.split(parameter)])


@dataclass(frozen=True, slots=True)
class Place:
    """Which of a row's parameters: layer and expert, counted from 0 over the whole model; None where there is none."""

    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """`{layer}` and `{expert}` in a name stand for their numbers."""

    megatron: str
    hf: tuple[str, ...]
    op: Op
    shape: tuple[int, ...]  # of Megatron's whole parameter, without padding
    pads_vocabulary: bool = False  # Megatron's has rows of zeros behind the vocabulary, to divide by tensor parallelism
    exported: bool = True  # False: a second place of a tensor that another row exports

    def hf_names(self, place: Place) -> list[str]:
        return [name.format(layer=place.layer, expert=place.expert) for name in self.hf]

    def megatron_name(self, place: Place) -> str:
        return self.megatron.format(layer=place.layer, expert=place.expert)

    def hf_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(part.shape) for part in self.op.split(torch.empty(self.shape, device="meta"))]


def places(row: Row, num_layers: int, num_experts: int) -> Iterator[Place]:
    """Every parameter of a row, in order."""
    for layer in range(num_layers) if "{layer}" in row.megatron else [None]:
        for expert in range(num_experts) if "{expert}" in row.megatron else [None]:
            yield Place(layer, expert)


def slice_along(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    return tensor if axis is None else tensor.chunk(size, dim=axis)[rank]


def padded_vocabulary(vocab_size: int, tensor_size: int) -> int:
    return -(-vocab_size // tensor_size) * tensor_size


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    padding = tensor.new_zeros(num_rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding]) if len(padding) else tensor


def rows_of_rank(num_rows: int, padded_rows: int, rank: int, size: int) -> slice:
    """The rows that a rank has of a tensor that is padded up to `padded_rows`; those behind `num_rows` are zeros."""
    length = padded_rows // size
    return slice(rank * length, min((rank + 1) * length, num_rows))


LAYER_NUMBER, EXPERT_NUMBER = re.compile(r"(?<=^decoder\.layers\.)\d+"), re.compile(r"(?<=\.local_experts\.)\d+")


def find_row(rows: Sequence[Row], megatron_name: str) -> tuple[Row, Place]:
    """The row of a parameter such as decoder.layers.3.mlp.linear_fc2.weight, and which of the row's it is.

    Raises ValueError for a parameter that no row knows.
    """
    layer, expert = LAYER_NUMBER.search(megatron_name), EXPERT_NUMBER.search(megatron_name)
    pattern = EXPERT_NUMBER.sub("{expert}", LAYER_NUMBER.sub("{layer}", megatron_name))
    for row in rows:
        if row.megatron == pattern:
            return row, Place(int(layer[0]) if layer else None, int(expert[0]) if expert else None)
    raise ValueError(f"model.path: no mapping for Megatron's parameter {megatron_name}")
