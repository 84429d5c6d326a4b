"""Reads the rows of foreign data sets: from files, folders, `datasets` folders, and the hub.

A row that cannot be read, such as a line that is not JSON, is passed on with its error, so that the importer can count
it, skip it or name its line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from megatron_oreal.data.files import Row, describe_json_error

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
INSTALL_DATASETS = "pip install datasets"
INSTALL_PARQUET = "pip install pyarrow"


@dataclass(slots=True, frozen=True)
class ForeignRow:
    """A row of a foreign data set, or the reason why it cannot be read."""

    index: int  # among the rows of its file
    line: int | None  # of a JSONL file, from 1
    value: Any = None
    fault: str | None = None

    @property
    def place(self) -> str:
        return f"row {self.index}" if self.line is None else f"line {self.line}: row {self.index}"


@dataclass(slots=True, frozen=True)
class RawData:
    """Foreign rows, read one after the other; `name` becomes the prompts' source and the start of their ids."""

    name: str
    origin: str  # the file or data set, for errors
    rows: Iterator[ForeignRow]


def open_source(source: str, split: str = "train", hub_config: str | None = None) -> list[RawData]:
    """Opens a file, each file of a folder, or a hub data set. Raises ValueError if `source` is none of these.

    The files of a folder are named by their paths in it, so that ids stay unique. An unreadable file raises when its
    rows are read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [RawData(path.stem, source, read_file(path))]
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return [RawData(f"{path.name}-{split}", source, numbered(load_saved(path, split)))]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(f"--input: {source} holds no {', '.join(SUFFIXES)} file; give a folder that does")
        return [
            RawData("-".join(file.relative_to(path).with_suffix("").parts), str(file), read_file(file))
            for file in files
        ]
    if path.suffix in SUFFIXES or path.exists() or not HUB_NAME.fullmatch(source):
        raise ValueError(f"--input: {source} is not a file; give a file, a folder or the name of a hub data set")
    return [RawData(f"{source.rpartition('/')[2]}-{split}", source, numbered(load_hub(source, split, hub_config)))]


def read_file(path: Path) -> Iterator[ForeignRow]:
    if path.suffix == ".csv":
        return numbered(read_csv(path))
    if path.suffix == ".parquet":
        return numbered(read_parquet(path))
    if path.suffix == ".json":
        return read_json(path)
    return read_lines(path)


def numbered(rows: Iterable[Any]) -> Iterator[ForeignRow]:
    for index, row in enumerate(rows):
        yield ForeignRow(index, None, row)


def read_lines(path: Path) -> Iterator[ForeignRow]:
    """Reads JSONL and skips blank lines."""
    index = 0
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            content = content.removeprefix(b"\xef\xbb\xbf") if line == 1 else content
            if not content.strip():
                continue
            try:
                yield ForeignRow(index, line, json.loads(content.rstrip(b"\r\n")))
            except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                yield ForeignRow(index, line, fault=f"is not JSON ({describe_json_error(error)}); fix the line")
            index += 1
    if not index:
        raise ValueError(f"--input: {path} is empty; it needs at least one line")


def read_json(path: Path) -> Iterator[ForeignRow]:
    """Reads one JSON list, or JSONL that is named .json, as the hub's JSON files often are."""
    try:
        rows = json.loads(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            return read_lines(path)
        raise ValueError(f"--input: {path} is not JSON ({error}); fix the file") from None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"--input: {path} must hold a non-empty list of rows")
    return numbered(rows)


def read_csv(path: Path) -> Iterator[Row]:
    """Reads the rows under a header line, as strings."""
    num_rows = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                num_rows += 1
                yield row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"--input: {path} is not CSV in UTF-8 ({error}); fix the file") from None
    if not num_rows:
        raise ValueError(f"--input: {path} has no row under its header")


def read_parquet(path: Path) -> Iterator[Row]:
    """Reads the rows batch by batch, so that a file larger than the memory can be read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"--input: reading {path} needs a package: {INSTALL_PARQUET}") from None
    num_rows = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                for row in batch.to_pylist():
                    num_rows += 1
                    yield plain(row)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"--input: {path} is not a readable parquet file ({reason}); fix the file") from None
    if not num_rows:
        raise ValueError(f"--input: {path} has no row")


def plain(value: Any) -> Any:
    """Returns the value as JSON would hold it: a decimal as its text, NaN as null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, Decimal):
        return format(value, "f")
    return None if isinstance(value, float) and value != value else value


def load_saved(path: Path, split: str) -> Iterator[Row]:
    """Reads a folder that `datasets` wrote with save_to_disk."""
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError:
        raise ValueError(f"--input: reading {path} needs a package: {INSTALL_DATASETS}") from None
    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--input: {path} is not a readable data set ({first_line(error)}); save it again") from None
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise ValueError(f"--split: {path} has no split {split!r}; its splits are {', '.join(loaded)}")
        loaded = loaded[split]
    return map(plain, loaded)


def load_hub(name: str, split: str, hub_config: str | None) -> Iterator[Row]:
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError
        from huggingface_hub.utils import logging
    except ImportError:
        raise ValueError(
            f"--input: {name} is not a file, and reading a hub data set needs a package: {INSTALL_DATASETS}"
        ) from None
    logging.set_verbosity_error()  # Otherwise a warning for every retry would hide the error.
    try:
        return map(plain, load_dataset(name, hub_config, split=split))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"--input: {name} is no file here, and as a hub data set its split {split} cannot be read "
            f"({first_line(error)}); check the name, --split and --config, or download it as a file"
        ) from None


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
