"""Reads and writes JSONL files. Errors name the line, and a failed write leaves no partial file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_oreal.observability.files import writing_atomically

Row = dict[str, Any]


def read_jsonl(path: Path, setting: str) -> Iterator[tuple[int, Row]]:
    """Yields (line number from 1, object) and skips blank lines.

    Raises ValueError, naming `setting` and the line, for a missing or empty file and for a line that is no JSON object.
    """
    if not path.is_file():
        below = "" if path.is_absolute() else f" below {Path.cwd()}"
        what = "is a folder" if path.is_dir() else f"does not exist{below}"
        raise ValueError(f"{setting}: {path} {what}; give a JSONL file")
    num_rows = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.rstrip(b"\r\n"))
            except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                fault = describe_json_error(error)
                raise ValueError(f"{setting}: {path} line {number} is not JSON ({fault}); fix the line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{setting}: {path} line {number} must be a JSON object, not {describe_type(row)}")
            num_rows += 1
            yield number, row
    if not num_rows:
        raise ValueError(f"{setting}: {path} is empty; it needs at least one line")


def describe_json_error(error: Exception) -> str:
    """Describes the error in a line of JSON with its column; the caller adds the line number."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Writes the rows and returns their number; it makes the folder if there is none."""
    num_rows = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_atomically(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            num_rows += 1
    return num_rows


def describe_type(value: object) -> str:
    """Returns the JSON name of a value's type, for errors."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    numbers = {int: "a number", float: "a number"}
    return (names | numbers).get(type(value), f"a {type(value).__name__}")
