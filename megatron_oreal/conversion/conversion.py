"""Converts whole checkpoints from Hugging Face to Megatron and back, tensor by tensor, as config.json lists them.

It needs no model, process group or GPU. A process holds about two parameters in memory at a time; the files are mapped.
Output is written under a temporary name, compared with the input bit by bit, and renamed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_oreal.config.model_files import ModelSettings, copy_model_file, read_model_settings, write_model_settings
from megatron_oreal.conversion.processes import CountBytes, map_pages, run_in_processes
from megatron_oreal.conversion.safetensors_files import Slot, create_files, fill
from megatron_oreal.conversion.trainer_shards import (
    HEAD_OF_ROLE,
    TrainerReader,
    has_rank_files,
    is_trainer_model,
    model_path_of_run,
)
from megatron_oreal.observability.files import temporary_directory
from megatron_oreal.weights import torch_dist
from megatron_oreal.weights.families import Architecture, HeadKind, parameters, read_architecture
from megatron_oreal.weights.hf_directory import INDEX, SHARD_BYTES, HfReader
from megatron_oreal.weights.mapping import Place, Row, padded_vocabulary
from megatron_oreal.weights.stream_filters import FP8_BLOCK, Stream, cast, fp8_settings, quantise_fp8
from megatron_oreal.weights.torch_dist import StoredChunk
from megatron_oreal.weights.torch_dist_reader import TorchDistReader, is_torch_dist, noted_head

SMALLEST_ITEM, LARGEST_ITEM = 2**26, 2**29  # bytes that a process converts at a time
COMPANIONS = (".json", ".txt", ".jinja", ".model", ".tiktoken", ".py")  # files of the tokenizer, configuration, code
INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # to compare the bits of any dtype
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForRewardModel")

Parameter = tuple[Row, Place]


class MegatronCheckpoint(Protocol):
    def dtype(self, row: Row, place: Place) -> torch.dtype: ...
    def check(self, rows: Sequence[Parameter]) -> None: ...
    def hf_tensors(self, row: Row, place: Place) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class ConversionOptions:
    dtype: torch.dtype | None = None  # None: the dtype stays as it is
    num_workers: int = 1
    verify: bool = True
    fp8_blocks: bool = False  # write linears as float8 blocks with scales; `dtype` is for the other tensors


@dataclass(frozen=True, slots=True)
class ConversionReport:
    num_tensors: int
    num_bytes: int  # of the parameters, as they were read


# ---- Hugging Face -> Megatron ---------------------------------------------------------------------------------------


def hf_to_megatron(
    hf: Path, out: Path, options: ConversionOptions, head: HeadKind | None = None, pad_to: int | None = None
) -> ConversionReport:
    """Writes `out` in torch_dist format, with config.json and the tokenizer beside. Raises ValueError for bad input."""
    prepare_output(out)
    architecture, head = read_architecture(hf), head or head_of_hf(hf)
    rows = exported(architecture, head)
    dtypes = check_hf(hf, rows, architecture, head)
    padded_rows = pad_to or padded_vocabulary(architecture.vocab_size, torch_dist.VOCABULARY_MULTIPLE)
    if padded_rows < architecture.vocab_size:
        raise ValueError(f"--pad-vocab-to {padded_rows} is less than the model's vocab_size={architecture.vocab_size}")
    sizes: dict[str, tuple[int, ...]] = {}
    stored: dict[str, torch.dtype] = {}
    for row, place in rows:
        dtype = options.dtype or dtypes[row.hf_names(place)[0]]
        shape = (padded_rows, *row.shape[1:]) if row.pads_vocabulary else row.shape
        for key in torch_dist.stored_keys(row, architecture):
            sizes[key] = (*torch_dist.stacked_sizes(row, architecture), *shape)
            if stored.setdefault(key, dtype) != dtype:
                raise ValueError(
                    f"--hf: {row.hf[0]} is {dtype} in one layer and {stored[key]} in another; give --dtype"
                )
    num_bytes = sum(size_of(row, dtypes[row.hf_names(place)[0]]) for row, place in rows)
    with temporary_directory(out) as directory:
        iteration = directory / torch_dist.ITERATION
        iteration.mkdir()
        items = [(number, item) for number, item in enumerate(work_items(rows, dtypes, num_bytes, options.num_workers))]
        work = WriteMegatron(hf, iteration, architecture, options.dtype, padded_rows)
        written = run_in_processes(work, items, options.num_workers, num_bytes, "writing")
        chunks = [chunk for part in written for chunk in part]
        torch_dist.write_metadata(iteration, chunks, sizes, stored, architecture)
        torch_dist.write_companions(iteration, architecture, head, padded_rows)
        (directory / torch_dist.TRACKER).write_text(torch_dist.ITERATION)
        copy_companions(hf, directory)
        if options.verify:
            compare(Compare(hf, directory, architecture), rows, dtypes, options.num_workers)
    return ConversionReport(len(dtypes), num_bytes)


@dataclass(frozen=True, slots=True)
class WriteMegatron:
    """Writes a run of parameters into one .distcp file."""

    hf: Path
    directory: Path
    architecture: Architecture
    dtype: torch.dtype | None
    padded_rows: int

    def __call__(self, item: tuple[int, list[Parameter]], count_bytes: CountBytes) -> list[StoredChunk]:
        number, rows = item
        reader = open_hf(self.hf)
        torch.serialization.set_crc32_options(False)  # they take half of the time
        chunks: list[StoredChunk] = []
        with (self.directory / f"__{number}_0.distcp").open("wb") as file:
            for row, place in rows:
                tensors = [reader.read(name, None, 0, 1) for name in row.hf_names(place)]
                for tensor in tensors:
                    map_pages(tensor)
                num_bytes = sum(tensor.nbytes for tensor in tensors)
                if self.dtype is not None:
                    tensors = [tensor.to(self.dtype) for tensor in tensors]
                chunks += torch_dist.write_parameter(file, row, place, tensors, self.architecture, self.padded_rows)
                count_bytes(num_bytes)
        return chunks


def check_hf(hf: Path, rows: Sequence[Parameter], architecture: Architecture, head: HeadKind) -> dict[str, torch.dtype]:
    """Returns every tensor's dtype. Raises ValueError for missing, extra and misshapen tensors, naming the first."""
    reader = open_hf(hf)
    reader.check_index()
    dtypes: dict[str, torch.dtype] = {}
    for row, place in rows:
        for name, expected in zip(row.hf_names(place), row.hf_shapes(), strict=True):
            shape, dtypes[name] = reader.describe(name)
            if shape != expected:
                raise ValueError(f"--hf: {name} has the shape {shape}, config.json asks for {expected}")
    # Old checkpoints also hold the rotary frequencies, and checkpoints with tied embeddings hold the embedding twice.
    extra = {name for name in reader.file_of if name not in dtypes and not name.endswith("rotary_emb.inv_freq")}
    if architecture.tied_embeddings and head == "lm":
        extra -= {"lm_head.weight", "output.weight"}
    if extra:
        model = f"{architecture.family} model with a {head} head"
        raise ValueError(f"--hf: {min(extra)} ({len(extra)} such) has no place in a {model}; see --head")
    return dtypes


# ---- Megatron -> Hugging Face ---------------------------------------------------------------------------------------


def megatron_to_hf(
    mcore: Path, out: Path, options: ConversionOptions, hf: Path | None = None, head: HeadKind | None = None
) -> ConversionReport:
    """Writes a Hugging Face directory `out`; config.json and the tokenizer come from `hf`."""
    prepare_output(out)
    hf = hf or config_source(mcore)
    architecture, head = read_architecture(hf), head or head_of_megatron(mcore)
    rows = exported(architecture, head)
    reader = open_megatron(mcore, architecture)
    reader.check(rows)
    kept = {name: reader.dtype(row, place) for row, place in rows for name in row.hf_names(place)}
    num_bytes = sum(size_of(row, kept[row.hf_names(place)[0]]) for row, place in rows)
    planned = plan_hf(rows, kept, options)
    with temporary_directory(out) as directory:
        slots = create_files(directory, planned, SHARD_BYTES)
        work = WriteHf(mcore, directory, architecture, slots, options)
        items = work_items(rows, kept, num_bytes, options.num_workers)
        run_in_processes(work, items, options.num_workers, num_bytes, "writing")
        copy_companions(hf, directory)
        quantisation = fp8_settings(slots) if options.fp8_blocks else None
        write_config(hf, directory, head, options.dtype or next(iter(kept.values())), quantisation)
        if options.verify:
            if not options.fp8_blocks:
                check_hf(directory, rows, architecture, head)
            compare(Compare(directory, mcore, architecture, options), rows, kept, options.num_workers)
    return ConversionReport(len(kept), num_bytes)


def plan_hf(
    rows: Sequence[Parameter], dtypes: dict[str, torch.dtype], options: ConversionOptions
) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Lists name, shape and dtype of each tensor to write. Raises ValueError for one that is not made of blocks."""
    planned = []
    for row, place in rows:
        for name, shape in zip(row.hf_names(place), row.hf_shapes(), strict=True):
            stored = list(as_stored(name, torch.empty(shape, dtype=dtypes[name], device="meta"), options))
            if len(stored) > 1 and any(size % FP8_BLOCK for size in shape):
                raise ValueError(
                    f"--fp8-blocks: {name} of the shape {shape} is not made of {FP8_BLOCK} x {FP8_BLOCK} blocks, "
                    "and engines do not read it; convert without"
                )
            planned += [(part, tuple(tensor.shape), tensor.dtype) for part, tensor in stored]
    return planned


def as_stored(name: str, tensor: Tensor, options: ConversionOptions) -> Iterable[tuple[str, Tensor]]:
    """Yields what is written for a Hugging Face tensor: the cast tensor, or its blocks and then their scales."""
    stream: Stream = [(name, tensor)]
    if options.dtype is not None:
        stream = cast(stream, options.dtype)
    return quantise_fp8(stream) if options.fp8_blocks else stream


@dataclass(frozen=True, slots=True)
class WriteHf:
    """Writes a run of parameters into the planned safetensors files."""

    mcore: Path
    directory: Path
    architecture: Architecture
    slots: dict[str, Slot]
    options: ConversionOptions

    def __call__(self, rows: list[Parameter], count_bytes: CountBytes) -> None:
        reader = open_megatron(self.mcore, self.architecture)
        for row, place in rows:
            for name, tensor in zip(row.hf_names(place), reader.hf_tensors(row, place), strict=True):
                map_pages(tensor)
                for part, stored in as_stored(name, tensor, self.options):
                    fill(self.directory, self.slots[part], stored)
                count_bytes(tensor.nbytes)


def write_config(
    hf: Path, directory: Path, head: HeadKind, dtype: torch.dtype, quantisation: ModelSettings | None
) -> None:
    """Writes config.json with the weights' dtype and, for a scalar head, the class that transformers loads."""
    settings = read_model_settings(hf)
    if head == "scalar":
        names = settings.get("architectures") or [""]
        settings["architectures"] = [name.replace("ForCausalLM", "ForSequenceClassification") for name in names]
        settings |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if quantisation is not None:
        settings["quantization_config"] = quantisation
    write_model_settings(directory, settings, dtype)


# ---- comparing ------------------------------------------------------------------------------------------------------


def verify(hf: Path, mcore: Path, num_workers: int, head: HeadKind | None = None) -> ConversionReport:
    """Raises ValueError, naming the first tensor, unless both hold the same bits, cast to the coarser dtype."""
    architecture = read_architecture(hf)
    head = head or head_of_hf(hf)
    rows = exported(architecture, head)
    dtypes = check_hf(hf, rows, architecture, head)
    open_megatron(mcore, architecture).check(rows)
    return ConversionReport(len(dtypes), compare(Compare(hf, mcore, architecture), rows, dtypes, num_workers))


@dataclass(frozen=True, slots=True)
class Compare:
    """Compares a run of parameters; raises ValueError for the first tensor that is not what `options` ask for."""

    hf: Path
    mcore: Path
    architecture: Architecture
    options: ConversionOptions = ConversionOptions()

    def __call__(self, rows: list[Parameter], count_bytes: CountBytes) -> None:
        hf, megatron = open_hf(self.hf), open_megatron(self.mcore, self.architecture)
        for row, place in rows:
            for name, converted in zip(row.hf_names(place), megatron.hf_tensors(row, place), strict=True):
                map_pages(converted)
                for part, expected in as_stored(name, converted, self.options):
                    map_pages(found := hf.read(part, None, 0, 1))
                    if not same_bits(found, expected):
                        raise ValueError(f"{part} of {self.hf} and {self.mcore} differ")
                count_bytes(converted.nbytes)


def compare(work: Compare, rows: Sequence[Parameter], dtypes: dict[str, torch.dtype], num_workers: int) -> int:
    """Compares everything, and returns the number of bytes."""
    num_bytes = sum(size_of(row, dtypes[row.hf_names(place)[0]]) for row, place in rows)
    run_in_processes(work, work_items(rows, dtypes, num_bytes, num_workers), num_workers, num_bytes, "verifying")
    return num_bytes


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Compares bits, so that NaN equals NaN and 0.0 differs from -0.0.

    Where the dtypes differ, one tensor must be the other one's cast to a dtype that is no larger.
    """
    if one.dtype != other.dtype:
        smaller, larger = sorted((one, other), key=lambda tensor: tensor.dtype.itemsize)
        if same_bits(smaller, larger.to(smaller.dtype)):
            return True
        return smaller.dtype.itemsize == larger.dtype.itemsize and same_bits(smaller.to(larger.dtype), larger)
    bits = INTEGER_OF_SIZE[one.dtype.itemsize]
    return torch.equal(one.view(bits), other.view(bits))


# ---- both -----------------------------------------------------------------------------------------------------------


def exported(architecture: Architecture, head: HeadKind) -> list[Parameter]:
    """Lists the parameters layer by layer, as files have them; those outside of the layers come first."""
    found = [(row, place) for row, place in parameters(architecture, head) if row.exported]
    return sorted(found, key=lambda parameter: -1 if parameter[1].layer is None else parameter[1].layer)


def size_of(row: Row, dtype: torch.dtype) -> int:
    return torch.Size(row.shape).numel() * dtype.itemsize


def work_items(
    rows: Sequence[Parameter], dtypes: dict[str, torch.dtype], num_bytes: int, num_workers: int
) -> list[list[Parameter]]:
    """Splits the parameters into several items for each worker, so that no worker waits long for the slowest."""
    wanted = min(LARGEST_ITEM, max(SMALLEST_ITEM, num_bytes // (4 * num_workers)))
    items: list[list[Parameter]] = []
    filled = wanted
    for row, place in rows:
        if filled >= wanted:
            items.append([])
            filled = 0
        items[-1].append((row, place))
        filled += size_of(row, dtypes[row.hf_names(place)[0]])
    return items


@lru_cache(maxsize=4)
def open_hf(path: Path) -> HfReader:
    return HfReader(path)


@lru_cache(maxsize=4)
def open_megatron(path: Path, architecture: Architecture) -> MegatronCheckpoint:
    if has_rank_files(path):
        return TrainerReader(path)
    if is_torch_dist(path):
        return TorchDistReader(path, architecture)
    raise ValueError(f"--mcore: {path} is neither a torch_dist checkpoint nor a model of the trainer's{hint_at(path)}")


def hint_at(path: Path) -> str:
    """Says what to name instead of a folder that holds checkpoints: a run, its checkpoints, or one of them."""
    models = sorted(folder.name for folder in path.glob("*") if is_trainer_model(folder))
    if models:
        return f"; give one of its models: {', '.join(str(path / name) for name in models)}"
    run = path.parent if path.name == "checkpoints" else path
    if (run / "checkpoints").is_dir():
        return f"; of a run, `megatron-oreal export {run} best` writes the best checkpoint (or last, or a step)"
    return ""


def config_source(mcore: Path) -> Path:
    if (mcore / "config.json").is_file():
        return mcore
    if hint := hint_at(mcore):
        raise ValueError(f"--mcore: {mcore} is not a single model{hint}")
    path = model_path_of_run(mcore) if is_trainer_model(mcore) else None
    if path is None:
        raise ValueError(f"--hf: {mcore} comes without config.json; give the Hugging Face directory it was made from")
    return path


def head_of_hf(hf: Path) -> HeadKind:
    """Returns the head that config.json declares."""
    names = read_model_settings(hf).get("architectures") or []
    return "scalar" if any(str(name).endswith(CLASSIFIERS) for name in names) else "lm"


def head_of_megatron(mcore: Path) -> HeadKind:
    """Returns the head that the conversion has noted, or that the role of the trainer's model implies."""
    if is_trainer_model(mcore):
        if mcore.resolve().name not in HEAD_OF_ROLE:
            raise ValueError(f"--head: say which head the model {mcore.resolve().name} has")
        return HEAD_OF_ROLE[mcore.resolve().name]
    return noted_head(mcore)


def prepare_output(out: Path) -> None:
    """Raises an error if the output exists, and removes files that killed conversions to the same place have left."""
    if out.exists():
        raise ValueError(f"--out: {out} exists; remove it or name another")
    for stale in out.parent.glob(f".{out.name}.*.tmp"):
        ours = re.fullmatch(r"(\d+)\.[0-9a-f]{8}\.tmp", stale.name.removeprefix(f".{out.name}."))
        if ours and not Path(f"/proc/{ours[1]}").exists() and Path("/proc/self").exists():
            shutil.rmtree(stale, ignore_errors=True)


def copy_companions(source: Path, directory: Path) -> None:
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in COMPANIONS and file.name != INDEX and file.name != torch_dist.TRACKER:
            copy_model_file(file, directory / file.name)
