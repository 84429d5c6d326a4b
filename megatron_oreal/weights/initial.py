"""Reads the weights that a run starts from: a Hugging Face directory, or one of torch_dist (`megatron-oreal convert`).

Both are read by name and slice: each tensor- and pipeline-parallel rank reads its own part, without collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import Architecture, HeadKind, canonical_name, parameter_rows, parameters
from megatron_oreal.weights.hf_directory import HfReader
from megatron_oreal.weights.mapping import Place, Row, find_row, padded_vocabulary
from megatron_oreal.weights.torch_dist_reader import TorchDistReader, is_torch_dist


class WeightsReader(Protocol):
    def has_head(self, head: HeadKind) -> bool: ...
    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]: ...
    def shard(self, row: Row, place: Place, padded_rows: int, rank: int, size: int) -> Tensor: ...


def open_weights(path: Path, architecture: Architecture) -> WeightsReader:
    """Opens either kind of directory. Raises ValueError when it holds neither kind of weights."""
    return TorchDistReader(path, architecture, "model.path") if is_torch_dist(path) else HfReader(path)


def load_parameters(
    named: Iterable[tuple[str, Tensor]], path: Path, architecture: Architecture, head: HeadKind, layout: ParallelLayout
) -> None:
    """Fills this rank's parameters, which have Megatron's global names; a scalar head that the file lacks stays.

    Raises ValueError for a missing or misshapen tensor, naming it.
    """
    rows, reader = parameter_rows(architecture, head), open_weights(path, architecture)
    keeps_own_head = head == "scalar" and not reader.has_head(head)
    padded_rows = padded_vocabulary(architecture.vocab_size, layout.tensor_size)
    for name, parameter in named:
        row, place = find_row(rows, canonical_name(name))
        if keeps_own_head and row.megatron == "output_layer.weight":
            continue
        shard = reader.shard(row, place, padded_rows, layout.tensor_rank, layout.tensor_size)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"model.path: {', '.join(row.hf_names(place))} of {path} give {tuple(shard.shape)} where config.json "
                f"asks for {tuple(parameter.shape)}; give the weights that belong to it"
            )
        with torch.no_grad():
            parameter.copy_(shard)


def hf_weights(path: Path, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yields a language model's whole tensors with their Hugging Face names, one at a time."""
    reader = open_weights(path, architecture)
    for row, place in parameters(architecture, "lm"):
        if row.exported:
            yield from zip(row.hf_names(place), reader.hf_tensors(row, place), strict=True)
