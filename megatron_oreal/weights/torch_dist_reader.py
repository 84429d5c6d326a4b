"""Reads torch_dist checkpoints without a model, a process group or a GPU. torch_dist.py says what they consist of.

Checkpoints of megatron-core itself can be read too, whatever layout wrote them, and so can those whose layers differ,
where the names hold the layer's number. Nothing is unpickled that could run code.
"""

from __future__ import annotations

import io
import itertools
import math
import mmap
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from megatron_oreal.weights.families import Architecture, HeadKind
from megatron_oreal.weights.mapping import Place, Row, pad_rows, rows_of_rank
from megatron_oreal.weights.torch_dist import ITERATION, TRACKER, stacked_offsets, stacked_sizes, stored_keys


class MetadataUnpickler(pickle.Unpickler):
    """Unpickles only the descriptions that a .metadata file consists of, and refuses everything else."""

    def __init__(self, file: IO[bytes], setting: str) -> None:
        super().__init__(file)
        self.setting = setting

    MODULES = tuple(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner"))
    CLASSES = (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING", "_StorageInfo",
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if module in self.MODULES and name in self.CLASSES:
            return super().find_class(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        if (module, name) in (("torch.serialization", "_get_layout"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        if module == "pathlib" and name in ("PosixPath", "PurePosixPath"):  # of StorageMeta
            return super().find_class(module, name)
        raise ValueError(f"{self.setting}: .metadata holds a {module}.{name}, which no checkpoint needs: it is refused")


class FileView(io.RawIOBase):
    """A read-only file object over a part of a file."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer, self.position = buffer, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = (0, self.position, len(self.buffer))[whence] + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, target: Any) -> int:
        count = max(0, min(len(target), len(self.buffer) - self.position))
        target[:count] = self.buffer[self.position : self.position + count]
        self.position += count
        return count


class TorchDistReader:
    """Reads a torch_dist checkpoint's parameters as Hugging Face tensors, or a tensor-parallel rank's part of one.

    Files are mapped, and only what is asked for is read. Raises ValueError, beginning with `setting`, for whatever is
    wrong.
    """

    def __init__(self, path: Path, architecture: Architecture, setting: str = "--mcore") -> None:
        self.setting = setting
        self.directory, self.architecture = iteration_directory(path, setting), architecture
        try:
            with (self.directory / ".metadata").open("rb") as file:
                metadata = MetadataUnpickler(file, setting).load()
            self.tensors: dict[str, TensorStorageMetadata] = {
                key: value
                for key, value in metadata.state_dict_metadata.items()
                if isinstance(value, TensorStorageMetadata)
            }
            self.storage = dict(metadata.storage_data)
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError):
            raise ValueError(
                f"{self.setting}: {self.directory / '.metadata'} is damaged; convert or save again"
            ) from None
        self.prefix = "model." if "model.embedding.word_embeddings.weight" in self.tensors else ""
        self.maps: dict[str, mmap.mmap] = {}
        self.chunks_at: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}  # by key and stacked offsets

    def dtype(self, row: Row, place: Place) -> torch.dtype:
        return self._find(row, place)[1].properties.dtype

    def check(self, rows: Sequence[tuple[Row, Place]]) -> None:
        """Raises ValueError for missing and misshapen tensors, and for parameters that no row reads."""
        used: set[str] = set()
        for row, place in rows:
            used |= {self._checked(row, place)[0], *(self.prefix + key for key in stored_keys(row, self.architecture))}
        ours = (f"{self.prefix}embedding.", f"{self.prefix}decoder.", f"{self.prefix}output_layer.")
        if extra := [key for key in self.tensors if key.startswith(ours) and key not in used]:
            raise ValueError(f"{self.setting}: {extra[0]} ({len(extra)} such) has no place in the model of config.json")

    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]:
        whole = self._read(*self._find(row, place))
        return row.op.split(whole[: row.shape[0]] if row.pads_vocabulary else whole)

    def has_head(self, head: HeadKind) -> bool:
        return noted_head(self.directory) == head

    def shard(self, row: Row, place: Place, padded_rows: int, rank: int, size: int) -> Tensor:
        """Reads a tensor-parallel rank's part of a parameter; vocabularies are padded up to `padded_rows`."""
        whole = self._read(*self._checked(row, place))
        if row.pads_vocabulary:
            return pad_rows(whole[rows_of_rank(row.shape[0], padded_rows, rank, size)], padded_rows // size)
        return row.op.shard(whole, rank, size)

    def _checked(self, row: Row, place: Place) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        """Does what `_find` does, and checks the shape that config.json asks for."""
        key, described, lead = self._find(row, place)
        shape = tuple(described.size[len(lead) :])
        fits = shape == row.shape or (row.pads_vocabulary and shape[1:] == row.shape[1:] and shape >= row.shape)
        stacked = stacked_sizes(row, self.architecture)
        if not fits or tuple(described.size[: len(lead)]) != stacked[len(stacked) - len(lead) :]:
            raise ValueError(
                f"{self.setting}: {key} has the shape {tuple(described.size)}, "
                f"config.json asks for {(*stacked, *row.shape)}"
            )
        return key, described, lead

    def _find(self, row: Row, place: Place) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        """Returns a parameter's key, its description, and its offsets in the stacked dimensions."""
        lead = stacked_offsets(place)
        for key in stored_keys(row, self.architecture):
            if (found := self.tensors.get(self.prefix + key)) is not None:
                return self.prefix + key, found, lead
            unlike = self.prefix + key.replace("decoder.layers.", f"decoder.layers.{place.layer}.")
            if (found := self.tensors.get(unlike)) is not None:
                return unlike, found, lead[1:]
        raise ValueError(f"{self.setting}: {self.directory} has no tensor {stored_keys(row, self.architecture)[0]}")

    def _read(self, key: str, described: TensorStorageMetadata, lead: tuple[int, ...]) -> Tensor:
        shape = described.size[len(lead) :]
        whole, num_filled = None, 0
        for chunk in self._chunks_at(key, described, lead):
            offsets, sizes = chunk.offsets[len(lead) :], chunk.sizes[len(lead) :]
            inner = tuple(number - offset for number, offset in zip(lead, chunk.offsets, strict=False))
            part = self._chunk(key, chunk).reshape(chunk.sizes)[inner]
            if sizes == shape:
                return part
            if whole is None:
                whole = torch.empty(shape, dtype=described.properties.dtype)
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
            num_filled += math.prod(sizes)
        if whole is None or num_filled < whole.numel():
            raise ValueError(f"{self.setting}: {self.directory} lacks parts of {key}; save the checkpoint again")
        return whole

    def _chunks_at(
        self, key: str, described: TensorStorageMetadata, lead: tuple[int, ...]
    ) -> list[ChunkStorageMetadata]:
        """Returns the chunks that hold a part of one layer and expert."""
        if key not in self.chunks_at:
            found = self.chunks_at[key] = {}
            for chunk in described.chunks:
                stacked = (range(o, o + s) for o, s in zip(chunk.offsets[: len(lead)], chunk.sizes, strict=False))
                for position in itertools.product(*stacked):
                    found.setdefault(position, []).append(chunk)
        return self.chunks_at[key].get(lead, [])

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """Returns a view into the mapped file, not a copy."""
        stored = self.storage.get(MetadataIndex(key, chunk.offsets))
        if stored is None:
            raise ValueError(
                f"{self.setting}: {self.directory / '.metadata'} does not say where {key} is; save it again"
            )
        buffer = memoryview(self._map(stored.relative_path))[stored.offset : stored.offset + stored.length]
        try:
            described = torch.load(cast(IO[bytes], FileView(buffer)), map_location="meta", weights_only=True)
            begin = first_record(FileView(buffer))
            num_elements = described.untyped_storage().nbytes() // described.dtype.itemsize
            storage = torch.frombuffer(buffer, dtype=described.dtype, count=num_elements, offset=begin)
            return storage.as_strided(described.shape, described.stride(), described.storage_offset())
        except (
            zipfile.BadZipFile,
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            AttributeError,
            KeyError,
            ValueError,
        ):
            file = self.directory / stored.relative_path
            raise ValueError(
                f"{self.setting}: {file} is damaged where {key} should be; convert or save again"
            ) from None

    def _map(self, name: str) -> mmap.mmap:
        if name not in self.maps:
            if Path(name).name != name:
                raise ValueError(
                    f"{self.setting}: .metadata names the file {name}, outside of the checkpoint: it is refused"
                )
            try:
                with (self.directory / name).open("rb") as file:  # copy-on-write: torch warns of what it cannot write
                    self.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self.setting}: {self.directory / name} cannot be read: {error}") from None
        return self.maps[name]


def first_record(file: FileView) -> int:
    """Returns the byte at which the first tensor of a torch.save file begins; records are stored uncompressed."""
    with zipfile.ZipFile(file) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    file.seek(entry.header_offset + 26)
    lengths = file.read(4) or b""
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def is_torch_dist(path: Path) -> bool:
    return (path / TRACKER).is_file() or (path / ".metadata").is_file()


def iteration_directory(path: Path, setting: str = "--mcore") -> Path:
    """Returns the directory with .metadata: `path` itself, or the one that its tracker file names."""
    if (path / ".metadata").is_file():
        return path
    if not (path / TRACKER).is_file():
        raise ValueError(f"{setting}: {path} is no checkpoint: it holds neither {TRACKER} nor .metadata")
    latest = (path / TRACKER).read_text().strip()
    name = latest if latest == ITERATION else f"iter_{int(latest):07d}" if latest.isdecimal() else ""
    if not name or not (path / name / ".metadata").is_file():
        raise ValueError(f"{setting}: {path / TRACKER} names {latest!r}, which is no torch_dist checkpoint there")
    return path / name


def read_common(path: Path) -> dict[str, Any]:
    """Reads common.pt of a checkpoint as plain values; objects that would need code of their own are refused."""
    file = iteration_directory(path) / "common.pt"
    # The entry stays registered, like Megatron's own: safe_globals() would remove Megatron's entry at its end.
    torch.serialization.add_safe_globals([Namespace])
    try:
        common = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
        return {}
    return common if isinstance(common, dict) else {}


def noted_head(path: Path) -> HeadKind:
    """Returns the head that the conversion has noted; Megatron's own checkpoints are language models."""
    arguments = read_common(path).get("args")
    noted = vars(arguments).get("head") if isinstance(arguments, Namespace) else None
    return "scalar" if noted == "scalar" else "lm"
