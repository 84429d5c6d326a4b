"""Writes and reads a trained model and its optimizer as Megatron's torch_dist checkpoint, by torch's own file format.

Every rank copies what it has to write to the host and plans for itself; torch's writer can then write the copies in
another thread, because it runs no collective. The first rank makes .metadata from all ranks' plans in the end.
Reading is by rectangles: whatever layout has written the file, a rank reads what it holds itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_oreal.checkpoint.pieces import OPTIMIZER, Piece, Trainable
from megatron_oreal.observability.files import sync_file
from megatron_oreal.weights.families import Architecture, HeadKind, parameter_rows
from megatron_oreal.weights.torch_dist import stored_keys, write_companions, write_extra_states
from megatron_oreal.weights.torch_dist_reader import MetadataUnpickler


class OtherModelError(ValueError):
    """The checkpoint is whole, but of another model or another kind of optimizer. The message names both."""


@dataclass
class HostCopies(DefaultSavePlanner):  # type: ignore[misc]
    """What a rank writes of one model, copied to the host; it does not change when training goes on."""

    plan: SavePlan
    copies: dict[MetadataIndex, Tensor] = field(repr=False)

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.copies[write_item.index]


def copy_to_host(pieces: Sequence[Piece], rank: int) -> HostCopies:
    items, copies = [], {}
    for piece in pieces:
        if not piece.is_written_here:
            continue
        index = MetadataIndex(piece.key, torch.Size(piece.offsets))
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), piece.values.shape)
        data = TensorWriteData(chunk, TensorProperties(dtype=piece.values.dtype), torch.Size(piece.whole))
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        copies[index] = piece.values.to("cpu", copy=True)
    return HostCopies(SavePlan(items, _StoragePrefix(f"__{rank}_")), copies)


def write_copies(folder: Path, copies: HostCopies) -> list[WriteResult]:
    """Writes this rank's file and waits until it is on disk. Not a collective."""
    return list(FileSystemWriter(folder).write_data(copies.plan, copies).value())


def finish_folder(
    folder: Path,
    plans: Sequence[SavePlan],
    results: Sequence[list[WriteResult]],
    architecture: Architecture,
    head: HeadKind,
) -> None:
    """Writes what the first rank adds to the files of all ranks: .metadata, and what Megatron's own readers ask for."""
    metadata = create_default_global_save_plan(list(plans))[1]
    tensors: dict[str, Any] = dict(metadata.state_dict_metadata)
    for key, described in tensors.items():
        num_written = sum(math.prod(chunk.sizes) for chunk in described.chunks)
        assert num_written == math.prod(described.size), f"{key}: {num_written} elements of {described.size}"
    extra, indices = write_extra_states(folder, architecture)
    metadata.state_dict_metadata |= {index.fqn: described for index, described in indices.items()}
    extras = [WriteResult(index, extra.length, extra) for index in indices]
    write_companions(folder, architecture, head, architecture.vocab_size)
    for name in ("common.pt", "metadata.json", extra.relative_path):
        sync_file(folder / name)
    FileSystemWriter(folder).finish(metadata, [*results, extras])


def read_metadata(folder: Path) -> Metadata:
    with (folder / ".metadata").open("rb") as file:
        metadata: Metadata = MetadataUnpickler(file, "run_dir").load()
    return metadata


class InPlace(DefaultLoadPlanner):  # type: ignore[misc]
    """Puts what torch reads into the rank's own tensors."""

    def __init__(self, pieces: dict[MetadataIndex, Piece]) -> None:
        super().__init__()
        self.pieces = pieces

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.pieces[read_item.dest_index].values
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None: ...


def read_in_place(folder: Path, metadata: Metadata, pieces: Sequence[Piece]) -> None:
    """Fills the pieces from the checkpoint of a model. Not a collective.

    Raises ValueError where the files lack a part, and whatever torch raises for damaged ones.
    """
    reader = FileSystemReader(folder)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    items: list[ReadItem] = []
    by_key: dict[str, list[Piece]] = {}
    described: dict[str, Any] = metadata.state_dict_metadata
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    for key, parts in by_key.items():
        chunks = [ChunkStorageMetadata(torch.Size(part.offsets), part.values.shape) for part in parts]
        found = create_read_items_for_chunk_list(key, described[key], chunks)
        if sum(math.prod(item.lengths) for item in found) != sum(part.values.numel() for part in parts):
            raise ValueError(f"parts of {key} are missing")
        items += found
    targets = {MetadataIndex(piece.key, torch.Size(piece.offsets)): piece for piece in pieces}
    with torch.no_grad():
        reader.read_data(LoadPlan(items), InPlace(targets))


def check_same_model(folder: Path, metadata: Metadata, model: Trainable) -> None:
    """Raises OtherModelError where the checkpoint's tensors are those of another architecture or head."""
    described: dict[str, Any] = metadata.state_dict_metadata
    rows = parameter_rows(model.architecture, model.head.kind)
    wanted = {stored_keys(row, model.architecture)[0] for row in rows}
    stored = {
        key
        for key, value in described.items()
        if isinstance(value, TensorStorageMetadata) and not key.startswith(OPTIMIZER)
    }
    for difference, words in ((stored - wanted, "which this run's model lacks"), (wanted - stored, "")):
        if difference:
            has = f"{folder} has {min(difference)}, {words}" if words else f"{folder} lacks {min(difference)}"
            raise OtherModelError(f"model.path: {has}: it is of another model; choose another run_dir")


def check_pieces(folder: Path, metadata: Metadata, pieces: Sequence[Piece]) -> None:
    """Raises OtherModelError where a tensor has another shape or dtype, or where the optimizer keeps other tensors."""
    described: dict[str, Any] = metadata.state_dict_metadata
    for piece in pieces:
        found = described.get(piece.key)
        is_optimizers = piece.key.startswith(OPTIMIZER)
        if found is None:
            raise OtherModelError(
                f"optimizer: {folder} lacks {piece.key}: another kind of optimizer wrote it; restore model.dtype and "
                "the optimizer's settings, or choose another run_dir"
            )
        if tuple(found.size) != piece.whole:
            raise OtherModelError(
                f"model.path: {piece.key} of {folder} has the shape {tuple(found.size)}, this run's model has "
                f"{piece.whole}: it is of another model; choose another run_dir"
            )
        if found.properties.dtype != piece.values.dtype:
            raise OtherModelError(
                f"{'optimizer.moments' if is_optimizers else 'model.dtype'}: {piece.key} of {folder} is "
                f"{found.properties.dtype}, this run needs {piece.values.dtype}; restore the setting, or choose "
                "another run_dir"
            )
