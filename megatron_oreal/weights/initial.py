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

HEAD = "output_layer.weight"


class WeightsReader(Protocol):
    def has_head(self, head: HeadKind) -> bool: ...
    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]: ...
    def shard(self, row: Row, place: Place, padded_rows: int, rank: int, size: int) -> Tensor: ...


def open_weights(path: Path, architecture: Architecture) -> WeightsReader:
    """Opens either kind of directory. Raises ValueError when it holds neither kind of weights."""
    return TorchDistReader(path, architecture, "model.path") if is_torch_dist(path) else HfReader(path)


def check_trunk(path: Path, architecture: Architecture, setting: str = "model.path") -> None:
    """Compares the weights below the head with what config.json asks for, by the files' headers alone.

    Raises ValueError, naming the first, for a tensor that is missing, misshapen, or of no use to the model, such as the
    bias of another family: trained without it, the model would be another one. Only Hugging Face directories are read.
    """
    if is_torch_dist(path):
        return
    reader = HfReader(path)
    expected = {
        name: shape
        for row, place in parameters(architecture, "lm")
        if row.exported and row.megatron != HEAD
        for name, shape in zip(row.hf_names(place), row.hf_shapes(), strict=True)
    }
    for name, shape in expected.items():
        if (found := reader.describe(name)[0]) != shape:
            raise ValueError(
                f"{setting}: {name} of {path} has the shape {found}, config.json asks for {shape}; give the weights "
                "that belong to it"
            )
    trunks = tuple({name.partition(".")[0] + "." for name in expected})
    extra = sorted(
        name
        for name in reader.file_of
        if name.startswith(trunks) and name not in expected and not name.endswith("rotary_emb.inv_freq")
    )
    if extra:
        raise ValueError(
            f"{setting}: {extra[0]} of {path} ({len(extra)} such) has no place in a model of the type "
            f"{architecture.family}; config.json and the weights must agree"
        )


def load_parameters(
    named: Iterable[tuple[str, Tensor]], path: Path, architecture: Architecture, head: HeadKind, layout: ParallelLayout
) -> None:
    """Fills this rank's parameters, which have Megatron's global names; a scalar head that the file lacks stays.

    Raises ValueError for a missing or misshapen tensor, naming it.
    """
    check_trunk(path, architecture)
    rows, reader = parameter_rows(architecture, head), open_weights(path, architecture)
    keeps_own_head = head == "scalar" and not reader.has_head(head)
    padded_rows = padded_vocabulary(architecture.vocab_size, layout.tensor_size)
    for name, parameter in named:
        row, place = find_row(rows, canonical_name(name))
        if keeps_own_head and row.megatron == HEAD:
            continue
        shard = reader.shard(row, place, padded_rows, layout.tensor_rank, layout.tensor_size)
        if shard.shape != parameter.shape:
            raise ValueError(
                f"model.path: {', '.join(row.hf_names(place))} of {path} give {tuple(shard.shape)} where config.json "
                f"asks for {tuple(parameter.shape)}; give the weights that belong to it"
            )
        check_finite(", ".join(row.hf_names(place)), shard, path)
        with torch.no_grad():
            parameter.copy_(shard)


def hf_weights(path: Path, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Yields a language model's whole tensors with their Hugging Face names, one at a time."""
    reader = open_weights(path, architecture)
    for row, place in parameters(architecture, "lm"):
        if row.exported:
            for name, tensor in zip(row.hf_names(place), reader.hf_tensors(row, place), strict=True):
                check_finite(name, tensor, path)
                yield name, tensor


def check_finite(name: str, tensor: Tensor, path: Path) -> None:
    """Raises ValueError for weights with NaN or infinity, with which every answer would be noise."""
    if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):
        raise ValueError(
            f"model.path: {name} of {path} holds values that are not finite (NaN or infinity): the file is broken; "
            "download or export the model again"
        )
