"""Reads tensors of Hugging Face directories, whole or in slices, and writes a weight stream as such a directory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_oreal.config.model_files import copy_model_file, read_model_settings, write_model_settings
from megatron_oreal.observability.files import save_tensors, temporary_directory
from megatron_oreal.weights.families import HeadKind
from megatron_oreal.weights.fingerprint import drain
from megatron_oreal.weights.mapping import Place, Row, pad_rows, rows_of_rank

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30  # that one file of an exported checkpoint holds at most

SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HfReader:
    """Reads tensors of a safetensors directory by name, on demand. Raises ValueError for missing files and names."""

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
        """Returns the tensor's shape and dtype."""
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
        """Reads the rank-th of `size` equal slices along `axis`."""
        stored = self._stored(name)
        if axis is None or size == 1:
            return stored[:]
        length = stored.get_shape()[axis] // size
        part = slice(rank * length, (rank + 1) * length)
        return stored[part] if axis == 0 else stored[:, part]

    def has_head(self, head: HeadKind) -> bool:
        return head == "lm" or "score.weight" in self.file_of

    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]:
        return [self.read(name, None, 0, 1) for name in row.hf_names(place)]

    def shard(self, row: Row, place: Place, padded_rows: int, rank: int, size: int) -> Tensor:
        """Reads a tensor-parallel rank's part of a Megatron parameter; vocabularies are padded up to `padded_rows`."""
        if row.pads_vocabulary:
            (name,) = row.hf_names(place)
            return pad_rows(self._rows_of_rank(name, row.shape[0], padded_rows, rank, size), padded_rows // size)
        pieces = [self.read(name, row.op.axis, rank, size) for name in row.hf_names(place)]
        try:
            return row.op.merge(pieces)
        except RuntimeError:
            names, shapes = ", ".join(row.hf_names(place)), [tuple(piece.shape) for piece in pieces]
            raise ValueError(f"model.path: {names} of shapes {shapes} do not fit together") from None

    def _rows_of_rank(self, name: str, num_rows: int, padded_rows: int, rank: int, size: int) -> Tensor:
        stored = self._stored(name)
        if (rows := stored.get_shape()[0]) != num_rows:
            raise ValueError(f"model.path: {name} has {rows} rows where config.json asks for vocab_size={num_rows}")
        part: Tensor = stored[rows_of_rank(num_rows, padded_rows, rank, size)]
        return part


def save_hf(stream: Iterable[tuple[str, Tensor]], source: Path, tokenizer: Path, out: Path, is_main: bool) -> None:
    """Consumes the stream on every rank; the first rank (`is_main`) writes it as a Hugging Face directory.

    config.json comes from `source`, but names the dtype of the weights that are written; the tokenizer's files are
    those of `tokenizer`. The directory appears whole or not at all.
    """
    if not is_main:
        drain(stream)
        return
    with temporary_directory(out) as directory:
        writer, tensors = ShardWriter(directory), iter(stream)
        try:
            for name, tensor in tensors:
                writer.add(name, tensor)
        except (OSError, SafetensorError):
            drain(tensors)
            raise
        writer.close()
        if (source / "config.json").is_file():
            write_model_settings(directory, read_model_settings(source), writer.dtype)
        copy_companions(source, directory, ("generation_config.json",))
        copy_companions(
            tokenizer,
            directory,
            ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
             "added_tokens.json", "chat_template.jinja", "tokenizer.model"),
        )  # fmt: skip


class ShardWriter:
    """Writes safetensors files of bounded size with their index, or a single file when one suffices."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, Tensor] = {}
        self.filled = self.total = 0
        self.shards: list[list[str]] = []
        self.bytes_of: Counter[torch.dtype] = Counter()

    def add(self, name: str, tensor: Tensor) -> None:
        if self.tensors and self.filled + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self.tensors[name] = tensor.cpu()
        self.filled += tensor.nbytes
        self.total += tensor.nbytes
        self.bytes_of[tensor.dtype] += tensor.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Returns the dtype that most of the added bytes have."""
        return self.bytes_of.most_common(1)[0][0]

    def _flush(self) -> None:
        save_tensors(self.tensors, self.directory / f"part-{len(self.shards)}", metadata={"format": "pt"})
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
            copy_model_file(source / name, directory / name)
