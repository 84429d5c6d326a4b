"""Hugging Face directories and live models: read into the shards, and a stream of whole tensors out of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_oreal.checkpoint.families import Architecture, Head, canonical_name, parameter_rows
from megatron_oreal.checkpoint.mapping import Place, Row, find_row, pad_rows, padded_vocabulary
from megatron_oreal.observability.files import temporary_directory

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BUCKET_BYTES = 512 * 2**20  # of a rank's parameters gathered in one collective
SHARD_BYTES = 4 * 2**30  # of one file of an exported checkpoint

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Layout(Protocol):
    """The part of models.parallel.ParallelLayout that is needed here."""

    @property
    def tensor_rank(self) -> int: ...
    @property
    def tensor_size(self) -> int: ...
    @property
    def tensor_group(self) -> dist.ProcessGroup: ...
    @property
    def pipeline_rank(self) -> int: ...
    @property
    def pipeline_size(self) -> int: ...
    @property
    def pipeline_group(self) -> dist.ProcessGroup: ...


class HfReader:
    """Tensors of a safetensors directory by name, read on demand. Raises ValueError for missing files and names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, Any] = {}
        self.file_of = self._index()

    def _index(self) -> dict[str, str]:
        if (self.path / INDEX).is_file():
            try:
                return dict(json.loads((self.path / INDEX).read_bytes())["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"model.path: {self.path / INDEX} is not an index; save the model again") from None
        if not (self.path / WEIGHTS).is_file():
            raise ValueError(f"model.path: {self.path} holds neither {WEIGHTS} nor {INDEX}; only safetensors are read")
        return dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)

    def _open(self, name: str) -> Any:
        if name not in self.files:
            if Path(name).name != name:
                raise ValueError(f"model.path: the index of {self.path} names {name!r}, outside of it: it is refused")
            try:
                self.files[name] = safe_open(self.path / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"model.path: {self.path / name} cannot be read: {error}") from None
        return self.files[name]

    def _stored(self, name: str) -> Any:
        try:
            return self._open(self.file_of[name]).get_slice(name)
        except (KeyError, SafetensorError):
            raise ValueError(f"model.path: {self.path} has no tensor {name}") from None

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype."""
        stored = self._stored(name)
        shape = tuple(stored.get_shape())
        kept = stored.get_dtype()
        if kept not in SAFETENSORS_DTYPES:
            raise ValueError(f"model.path: {name} of {self.path} is {kept}; known: {', '.join(SAFETENSORS_DTYPES)}")
        return shape, SAFETENSORS_DTYPES[kept]

    def check_index(self) -> None:
        """Raises ValueError where the index and the files disagree."""
        for file in sorted(set(self.file_of.values())):
            held = set(self._open(file).keys())
            listed = {name for name, at in self.file_of.items() if at == file}
            if held != listed:
                name = min(held ^ listed)
                reason = "is not in the index" if name in held else "is in the index, but not in the file"
                raise ValueError(f"model.path: {self.path / file}: {name} {reason}; save the model again")

    def read(self, name: str, axis: int | None, rank: int, size: int) -> Tensor:
        """The rank-th of `size` equal slices along `axis`."""
        stored = self._stored(name)
        if axis is None or size == 1:
            return stored[:]
        length = stored.get_shape()[axis] // size
        part = slice(rank * length, (rank + 1) * length)
        return stored[part] if axis == 0 else stored[:, part]

    def check_rows(self, names: Sequence[str], num_rows: int) -> None:
        for name in names:
            if (rows := self._stored(name).get_shape()[0]) != num_rows:
                raise ValueError(f"model.path: {name} has {rows} rows where config.json asks for vocab_size={num_rows}")

    def read_padded_rows(self, name: str, num_rows: int, rank: int, size: int) -> Tensor:
        """As `read` along axis 0 of the tensor with zeros appended up to `num_rows` rows."""
        stored = self._stored(name)
        length = num_rows // size
        return pad_rows(stored[rank * length : min((rank + 1) * length, stored.get_shape()[0])], length)


def load_parameters(
    parameters: Iterable[tuple[str, Tensor]],
    path: Path,
    architecture: Architecture,
    head: Head,
    layout: Layout,
    skip: Sequence[str] = (),
) -> None:
    """Fills this rank's parameters, named by Megatron's global names, from its slices of a Hugging Face directory.

    Raises ValueError for a missing or misshapen tensor, naming it.
    """
    rows, reader = parameter_rows(architecture, head), HfReader(path)
    vocabulary = padded_vocabulary(architecture.vocab_size, layout.tensor_size)
    for name, parameter in parameters:
        if name in skip:
            continue
        row, place = find_row(rows, canonical_name(name))
        rank, size = layout.tensor_rank, layout.tensor_size
        if row.pads_vocabulary:
            reader.check_rows(row.hf_names(place), architecture.vocab_size)
            pieces = [reader.read_padded_rows(hf, vocabulary, rank, size) for hf in row.hf_names(place)]
        else:
            pieces = [reader.read(hf, row.op.axis, rank, size) for hf in row.hf_names(place)]
        try:
            merged = row.op.merge(pieces)
        except RuntimeError:  # they do not even fit together
            merged = None
        if merged is None or merged.shape != parameter.shape:
            raise ValueError(
                f"model.path: {', '.join(row.hf_names(place))} of shape {[tuple(piece.shape) for piece in pieces]} do "
                f"not give the {tuple(parameter.shape)} that config.json asks for; give the weights that belong to it"
            )
        with torch.no_grad():
            parameter.copy_(merged)


@dataclass(frozen=True, slots=True)
class PlannedParameter:
    name: str  # Megatron's global name
    shape: tuple[int, ...]  # of the shard
    dtype: torch.dtype
    row: Row
    place: Place


class WeightStream:
    """A live model's weights as (Hugging Face name, whole tensor), on every rank, in one fixed order.

    The plan is made once. Every rank of the tensor and pipeline groups must iterate together: a bucket is one broadcast
    over the pipeline from its owner and one all-gather over tensor parallelism.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, Tensor]],
        architecture: Architecture,
        head: Head,
        layout: Layout,
    ) -> None:
        self.layout, self.vocab_size = layout, architecture.vocab_size
        self.parameters = dict(parameters)
        self.device = parameters[0][1].device
        rows = parameter_rows(architecture, head)
        local = []
        for name, parameter in parameters:
            row, place = find_row(rows, canonical_name(name))
            if row.exported:
                local.append(PlannedParameter(name, tuple(parameter.shape), parameter.dtype, row, place))
        self.plan: list[list[PlannedParameter]] = [[] for _ in range(layout.pipeline_size)]
        dist.all_gather_object(self.plan, local, group=layout.pipeline_group)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for stage, planned in enumerate(self.plan):
            for bucket in buckets(planned, BUCKET_BYTES):
                shards = self._gather(bucket, stage)
                yield from self._hf_tensors(bucket, shards)

    def _gather(self, bucket: list[PlannedParameter], stage: int) -> list[Tensor]:
        """The flat shards of a bucket, one a tensor-parallel rank."""
        layout = self.layout
        if layout.pipeline_rank == stage:
            flat = torch.cat([self.parameters[item.name].detach().reshape(-1) for item in bucket])
        else:
            num_elements = sum(torch.Size(item.shape).numel() for item in bucket)
            flat = torch.empty(num_elements, dtype=bucket[0].dtype, device=self.device)
        if layout.pipeline_size > 1:
            source = dist.get_global_rank(layout.pipeline_group, stage)
            dist.broadcast(flat, source, group=layout.pipeline_group)
        if layout.tensor_size == 1:
            return [flat]
        gathered = [torch.empty_like(flat) for _ in range(layout.tensor_size)]
        dist.all_gather(gathered, flat, group=layout.tensor_group)
        return gathered

    def _hf_tensors(self, bucket: list[PlannedParameter], shards: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        offset = 0
        for item in bucket:
            size = torch.Size(item.shape).numel()
            pieces = [item.row.op.split(shard[offset : offset + size].view(item.shape)) for shard in shards]
            offset += size
            for number, hf_name in enumerate(item.row.hf_names(item.place)):
                axis = item.row.op.axis
                whole = pieces[0][number] if axis is None else torch.cat([piece[number] for piece in pieces], dim=axis)
                yield hf_name, (whole[: self.vocab_size] if item.row.pads_vocabulary else whole).contiguous()


def buckets(planned: Sequence[PlannedParameter], num_bytes: int) -> Iterator[list[PlannedParameter]]:
    """Runs of parameters of one dtype and at most `num_bytes` together; a larger parameter is alone."""
    bucket: list[PlannedParameter] = []
    filled = 0
    for item in planned:
        size = torch.Size(item.shape).numel() * item.dtype.itemsize
        if bucket and (filled + size > num_bytes or item.dtype != bucket[0].dtype):
            yield bucket
            bucket, filled = [], 0
        bucket.append(item)
        filled += size
    if bucket:
        yield bucket


def save_hf(stream: Iterable[tuple[str, Tensor]], source: Path, tokenizer: Path, out: Path, writes: bool) -> None:
    """Consumes the stream on every rank; the one that `writes` makes a Hugging Face directory of it.

    config.json comes from `source`, the tokenizer's files from `tokenizer`. The directory appears whole or not at all.
    """
    if not writes:
        for _ in stream:
            pass
        return
    with temporary_directory(out) as directory:
        writer, tensors = ShardWriter(directory), iter(stream)
        try:
            for name, tensor in tensors:
                writer.add(name, tensor)
        except (OSError, SafetensorError):
            for _ in tensors:  # the other ranks are in its collectives
                pass
            raise
        writer.close()
        copy_companions(source, directory, ("config.json", "generation_config.json"))
        copy_companions(
            tokenizer,
            directory,
            ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
             "added_tokens.json", "chat_template.jinja", "tokenizer.model"),
        )  # fmt: skip


class ShardWriter:
    """Safetensors files of bounded size with their index; a single file when one suffices."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Tensor] = {}
        self.filled = self.total = 0
        self.shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        if self.tensors and self.filled + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self.tensors[name] = tensor.cpu()
        self.filled += tensor.nbytes
        self.total += tensor.nbytes

    def _flush(self) -> None:
        save_file(self.tensors, self.directory / f"part-{len(self.shards)}", metadata={"format": "pt"})
        self.shards.append(list(self.tensors))
        self.tensors, self.filled = {}, 0

    def close(self) -> None:
        if self.tensors:
            self._flush()
        if len(self.shards) == 1:
            (self.directory / "part-0").rename(self.directory / WEIGHTS)
            return
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self.shards):
            file = f"model-{number + 1:05d}-of-{len(self.shards):05d}.safetensors"
            (self.directory / f"part-{number}").rename(self.directory / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": weight_map}
        (self.directory / INDEX).write_text(json.dumps(index, indent=2))


def copy_companions(source: Path, directory: Path, names: Sequence[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
