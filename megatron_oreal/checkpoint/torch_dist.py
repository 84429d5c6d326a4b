"""Megatron-core's torch_dist checkpoints, written and read without a model, a process group or a GPU.

    DIR/latest_checkpointed_iteration.txt    "release", or an iteration's number
    DIR/release/.metadata                    which tensors there are, and where each chunk of them is
    DIR/release/__<n>_0.distcp               chunks, each a small file of torch.save
    DIR/release/common.pt, metadata.json     what Megatron-LM --load asks for besides

Every tensor has its whole shape, over all parallel ranks, with layers (and experts) in front: a checkpoint fits every
layout. Checkpoints of unlike layers, whose names hold the layer's number, are read too. Nothing is unpickled
that could run code.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import mmap
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_oreal.checkpoint.families import TRANSFORMER_ENGINE_ALIASES, Architecture, Head
from megatron_oreal.checkpoint.mapping import Place, Row, pad_rows

TRACKER, ITERATION = "latest_checkpointed_iteration.txt", "release"
ALIGNMENT = 64  # bytes, of each chunk in its file
NORM_KEYS = {canonical: key for key, canonical in TRANSFORMER_ENGINE_ALIASES.items()}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A part of a tensor, and where it is."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int  # bytes
    length: int


# ---- names ----------------------------------------------------------------------------------------------------------


def stored_keys(row: Row, architecture: Architecture) -> list[str]:
    """The names of a row's tensor over all layers: usually one."""
    key = row.megatron.replace(".{layer}.", ".").replace("local_experts.{expert}.", "experts.")
    for canonical, fused in NORM_KEYS.items():
        if key == f"decoder.layers.{canonical}":
            fused_key = f"decoder.layers.{fused}"
            # In front of experts, the local layers look for the fused name, Transformer Engine's for the plain one.
            return [fused_key, key] if architecture.experts and canonical.startswith("pre_mlp") else [fused_key]
    return [key]


def stacked_sizes(row: Row, architecture: Architecture) -> tuple[int, ...]:
    """Of the dimensions in front of the parameter's own."""
    layers = (architecture.num_layers,) if "{layer}" in row.megatron else ()
    return (*layers, architecture.num_experts) if "{expert}" in row.megatron else layers


def stacked_offsets(place: Place) -> tuple[int, ...]:
    return tuple(number for number in (place.layer, place.expert) if number is not None)


def extra_state_keys(architecture: Architecture) -> list[str]:
    """Of the objects without content that Megatron demands beside modules; what is not asked for does no harm."""
    attention = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
    modules = [*(f"self_attention.{name}" for name in attention), "input_layernorm", "pre_mlp_layernorm"]
    num_layers, num_experts = architecture.num_layers, architecture.num_experts
    if not num_experts:
        modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(num_layers):
        keys += [f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}" for module in modules]
        keys += [
            f"decoder.layers.mlp.experts.experts.{module}._extra_state/"
            f"shard_{layer}.{expert}_{num_layers}.{num_experts}"
            for module in ("linear_fc1", "linear_fc2")
            for expert in range(num_experts)
        ]
    return keys


# ---- writing --------------------------------------------------------------------------------------------------------


def write_parameter(
    file: IO[bytes], row: Row, place: Place, tensors: Sequence[Tensor], architecture: Architecture, padded_rows: int
) -> list[StoredChunk]:
    """Appends a parameter, made of its Hugging Face tensors, to an open .distcp file. Returns what was stored."""
    merged = row.op.merge(tensors)
    if row.pads_vocabulary:
        merged = pad_rows(merged, padded_rows)
    offsets = (*stacked_offsets(place), *(0 for _ in merged.shape))
    sizes = (*(1 for _ in stacked_offsets(place)), *merged.shape)
    begin, length = write_object(file, merged.contiguous().reshape(sizes))
    name = Path(file.name).name
    # The two names of one norm share its bytes.
    return [StoredChunk(key, offsets, sizes, name, begin, length) for key in stored_keys(row, architecture)]


def write_object(file: IO[bytes], content: Any) -> tuple[int, int]:
    file.write(bytes(-file.tell() % ALIGNMENT))
    begin = file.tell()
    torch.save(content, file)
    return begin, file.tell() - begin


def write_metadata(
    directory: Path,
    chunks: Iterable[StoredChunk],
    sizes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    architecture: Architecture,
) -> None:
    """Makes an iteration's directory complete; `sizes` and `dtypes` are those of the whole tensors, by key."""
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(size), [])
        for key, size in sizes.items()
    }
    storage: dict[MetadataIndex, filesystem._StorageInfo] = {}
    for chunk in chunks:
        described[chunk.key].chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        index = MetadataIndex(chunk.key, chunk.offsets)
        storage[index] = filesystem._StorageInfo(chunk.file, chunk.begin, chunk.length)
    with (directory / "__extra_0.distcp").open("wb") as file:
        begin, length = write_object(file, [None])
    for key in extra_state_keys(architecture):
        described[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = filesystem._StorageInfo("__extra_0.distcp", begin, length)
    metadata = Metadata(described, None, storage, StorageMeta(), "1.0.0")
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def write_companions(directory: Path, architecture: Architecture, head: Head, padded_rows: int) -> None:
    """Megatron-LM's own files, from which it also takes its arguments with --use-checkpoint-args."""
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(
        json.dumps(versions | {"common_backend": "torch", "common_backend_version": 1})
    )
    experts = architecture.experts
    arguments = Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_heads,
        group_query_attention=architecture.num_kv_heads != architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=architecture.rope_theta,
        rotary_percent=1.0,
        use_rope_scaling=architecture.rope_scaling is not None,
        normalization="RMSNorm",
        norm_epsilon=architecture.norm_eps,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        untie_embeddings_and_output_weights=not architecture.tied_embeddings,
        padded_vocab_size=padded_rows,
        num_experts=experts.count if experts else None,
        moe_ffn_hidden_size=experts.intermediate_size if experts else None,
        moe_router_topk=experts.num_per_token if experts else 2,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        head=head,
    )
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, "non_homogeneous_layers": False}
    common = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
    torch.save(common, directory / "common.pt")


# ---- reading --------------------------------------------------------------------------------------------------------


class MetadataUnpickler(pickle.Unpickler):
    """Makes nothing but the descriptions that a .metadata file consists of."""

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
        raise ValueError(f"--mcore: .metadata holds a {module}.{name}, which no checkpoint needs: it is refused")


class FileView(io.RawIOBase):
    """A part of a file, as a file."""

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
    """A torch_dist checkpoint's parameters as their Hugging Face tensors. Raises ValueError for whatever is wrong."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.directory, self.architecture = iteration_directory(path), architecture
        try:
            with (self.directory / ".metadata").open("rb") as file:
                metadata = MetadataUnpickler(file).load()
            self.tensors: dict[str, TensorStorageMetadata] = {
                key: value
                for key, value in metadata.state_dict_metadata.items()
                if isinstance(value, TensorStorageMetadata)
            }
            self.storage = dict(metadata.storage_data)
        except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError):
            raise ValueError(f"--mcore: {self.directory / '.metadata'} is damaged; convert or save again") from None
        self.prefix = "model." if "model.embedding.word_embeddings.weight" in self.tensors else ""
        self.maps: dict[str, mmap.mmap] = {}
        self.chunks_at: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}  # by key and stacked offsets

    def dtype(self, row: Row, place: Place) -> torch.dtype:
        return self._find(row, place)[1].properties.dtype

    def check(self, rows: Sequence[tuple[Row, Place]]) -> None:
        """Raises ValueError for missing and misshapen tensors, and for parameters that no row reads."""
        used: set[str] = set()
        for row, place in rows:
            key, described, lead = self._find(row, place)
            used |= {key, *(self.prefix + other for other in stored_keys(row, self.architecture))}
            shape = tuple(described.size[len(lead) :])
            fits = shape == row.shape or (row.pads_vocabulary and shape[1:] == row.shape[1:] and shape >= row.shape)
            lead_sizes = tuple(described.size[: len(lead)])
            if (
                not fits
                or lead_sizes != stacked_sizes(row, self.architecture)[len(stacked_offsets(place)) - len(lead) :]
            ):
                expected = (*stacked_sizes(row, self.architecture), *row.shape)
                raise ValueError(
                    f"--mcore: {key} has the shape {tuple(described.size)}, config.json asks for {expected}"
                )
        ours = (f"{self.prefix}embedding.", f"{self.prefix}decoder.", f"{self.prefix}output_layer.")
        if extra := [key for key in self.tensors if key.startswith(ours) and key not in used]:
            raise ValueError(f"--mcore: {extra[0]} ({len(extra)} such) has no place in the model of config.json")

    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]:
        key, described, lead = self._find(row, place)
        whole = self._read(key, described, lead)
        return row.op.split(whole[: row.shape[0]] if row.pads_vocabulary else whole)

    def _find(self, row: Row, place: Place) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        """(key, description, offsets in the stacked dimensions)"""
        lead = stacked_offsets(place)
        for key in stored_keys(row, self.architecture):
            if (found := self.tensors.get(self.prefix + key)) is not None:
                return self.prefix + key, found, lead
            unlike = self.prefix + key.replace("decoder.layers.", f"decoder.layers.{place.layer}.")
            if (found := self.tensors.get(unlike)) is not None:
                return unlike, found, lead[1:]
        raise ValueError(f"--mcore: {self.directory} has no tensor {stored_keys(row, self.architecture)[0]}")

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
            raise ValueError(f"--mcore: {self.directory} lacks parts of {key}; save the checkpoint again")
        return whole

    def _chunks_at(
        self, key: str, described: TensorStorageMetadata, lead: tuple[int, ...]
    ) -> list[ChunkStorageMetadata]:
        """The chunks that hold a part of one layer and expert."""
        if key not in self.chunks_at:
            found = self.chunks_at[key] = {}
            for chunk in described.chunks:
                stacked = (range(o, o + s) for o, s in zip(chunk.offsets[: len(lead)], chunk.sizes, strict=False))
                for position in itertools.product(*stacked):
                    found.setdefault(position, []).append(chunk)
        return self.chunks_at[key].get(lead, [])

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A view into the mapped file, without a copy of its own."""
        stored = self.storage.get(MetadataIndex(key, chunk.offsets))
        if stored is None:
            raise ValueError(f"--mcore: {self.directory / '.metadata'} does not say where {key} is; save it again")
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
            raise ValueError(f"--mcore: {file} is damaged where {key} should be; convert or save again") from None

    def _map(self, name: str) -> mmap.mmap:
        if name not in self.maps:
            if Path(name).name != name:
                raise ValueError(f"--mcore: .metadata names the file {name}, outside of the checkpoint: it is refused")
            try:
                with (self.directory / name).open("rb") as file:  # copy-on-write: torch warns of what it cannot write
                    self.maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except (OSError, ValueError) as error:
                raise ValueError(f"--mcore: {self.directory / name} cannot be read: {error}") from None
        return self.maps[name]


def first_record(file: FileView) -> int:
    """Where, in bytes, the first tensor of a torch.save file begins; records are stored as they are."""
    with zipfile.ZipFile(file) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    file.seek(entry.header_offset + 26)
    lengths = file.read(4) or b""
    return entry.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")


def is_torch_dist(path: Path) -> bool:
    return (path / TRACKER).is_file() or (path / ".metadata").is_file()


def iteration_directory(path: Path) -> Path:
    """The directory with .metadata: `path` itself, or the one that its tracker file names."""
    if (path / ".metadata").is_file():
        return path
    if not (path / TRACKER).is_file():
        raise ValueError(f"--mcore: {path} is no checkpoint: it holds neither {TRACKER} nor .metadata")
    latest = (path / TRACKER).read_text().strip()
    name = latest if latest == ITERATION else f"iter_{int(latest):07d}" if latest.isdecimal() else ""
    if not name or not (path / name / ".metadata").is_file():
        raise ValueError(f"--mcore: {path / TRACKER} names {latest!r}, which is no torch_dist checkpoint there")
    return path / name


def read_common(path: Path) -> dict[str, Any]:
    """common.pt of a checkpoint, as plain values; what would need code of its own is refused."""
    file = iteration_directory(path) / "common.pt"
    try:
        with torch.serialization.safe_globals([Namespace]):
            common = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError):
        return {}
    return common if isinstance(common, dict) else {}
