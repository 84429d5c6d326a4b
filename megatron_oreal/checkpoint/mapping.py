"""Rows that tie a Megatron parameter to its Hugging Face tensors, and the invertible operations between them.

Pure tensor code: no collectives, no files, no model. An operation works on a tensor-parallel shard exactly as on the
whole tensor: rank r of R takes the r-th of R equal slices of every Hugging Face tensor along `axis` and merges those,
and the other way round it splits its shard and the slices of all ranks are concatenated along `axis`.
"""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True)
class Direct:
    """The same tensor under another name."""

    axis: int | None = None

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]

    def split(self, parameter: Tensor) -> list[Tensor]:
        return [parameter]


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


@dataclass(frozen=True, slots=True)
class GateUp:
    """The gate's rows above the up projection's; a shard holds its slice of each."""

    axis: int | None = 0

    def merge(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=0)

    def split(self, parameter: Tensor) -> list[Tensor]:
        return list(parameter.chunk(2, dim=0))


@dataclass(frozen=True, slots=True)
class Row:
    """`{layer}` in a name stands for the layer's number, counted from 0 over the whole model."""

    megatron: str
    hf: tuple[str, ...]
    op: Op
    pads_vocabulary: bool = False  # Megatron's has rows of zeros behind the vocabulary, to divide by tensor parallelism
    exported: bool = True  # False: a second place of a tensor that another row exports

    def hf_names(self, layer: int | None) -> list[str]:
        return [name if layer is None else name.format(layer=layer) for name in self.hf]


def slice_along(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    return tensor if axis is None else tensor.chunk(size, dim=axis)[rank]


def padded_vocabulary(vocab_size: int, tensor_size: int) -> int:
    return -(-vocab_size // tensor_size) * tensor_size


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    padding = tensor.new_zeros(num_rows - tensor.shape[0], *tensor.shape[1:])
    return torch.cat([tensor, padding]) if len(padding) else tensor


def find_row(rows: Sequence[Row], megatron_name: str) -> tuple[Row, int | None]:
    """The row of a parameter such as decoder.layers.3.mlp.linear_fc2.weight, and its layer.

    Raises ValueError for a parameter that no row knows.
    """
    parts = megatron_name.split(".")
    layer = int(parts[2]) if parts[:2] == ["decoder", "layers"] else None
    pattern = ".".join([*parts[:2], "{layer}", *parts[3:]]) if layer is not None else megatron_name
    for row in rows:
        if row.megatron == pattern:
            return row, layer
    raise ValueError(f"model.path: no mapping for Megatron's parameter {megatron_name}")
