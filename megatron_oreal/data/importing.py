"""Converts the rows of a foreign data set to our format, and decides what happens to bad rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from megatron_oreal.data.examples import Example
from megatron_oreal.data.files import Row
from megatron_oreal.data.sources import ForeignRow, RawData

Item = TypeVar("Item")
Duplicates = Literal["keep", "exact", "near"]
MAX_NAMED = 12  # lines or columns that an error names


@dataclass(slots=True, frozen=True)
class DataFormat:
    """Says how the rows of one public data set are converted; README.md shows how to add one."""

    to_row: Callable[[Any], Row]  # a foreign row -> {"prompt", "answer"} and perhaps "pass_rate" and "tags"
    to_example: Callable[[Any], Example] | None = None  # None: the rows hold no solutions
    hub_config: str | None = None  # the configuration of the hub's data set
    # The default of --duplicates. Benchmarks, and training sets that recipes name by their size, keep all rows.
    duplicates: Duplicates = "keep"
    repeat_key: Callable[[Any], object] | None = None  # rows with the same key are one row, published several times


@dataclass(slots=True, frozen=True)
class BadRow:
    """A row that cannot be used. If `is_unjudgeable`, the row fits the format, but no response can equal its answer."""

    origin: str  # the file or data set
    row: ForeignRow
    reason: str
    is_unjudgeable: bool = False

    @property
    def place(self) -> str:
        return f"row {self.row.index}" if self.row.line is None else f"line {self.row.line}"

    def describe(self, format_name: str) -> str:
        if self.row.fault is not None:
            return f"{self.origin} {self.place} {self.reason}"
        if self.is_unjudgeable:
            return f"{self.origin} {self.row.place}: {self.reason}"
        columns = list(map(str, self.row.value)) if isinstance(self.row.value, dict) else []
        found = f"; the columns found are {shortened(columns)}" if columns else ""
        return f"{self.origin} {self.row.place} is not {format_name}: {self.reason}{found}"


@dataclass(slots=True)
class Imported(Generic[Item]):
    """The rows that were read from all sources."""

    items: list[Item] = field(default_factory=list)
    num_rows: int = 0  # without repeats
    num_repeats: int = 0
    bad: list[BadRow] = field(default_factory=list)


def read_rows(
    sources: Sequence[RawData],
    convert: Callable[[str, ForeignRow], Item],
    check: Callable[[Item], None],
    repeat_key: Callable[[Any], object] | None = None,
    limit: int | None = None,
) -> Imported[Item]:
    """Converts the first `limit` rows; a row for which `convert` or `check` raises ValueError goes to `bad`."""
    imported: Imported[Item] = Imported()
    seen: set[object] = set()
    has_misfit = False
    for name, origin, row in named_rows(sources):
        if imported.num_rows == limit:
            break
        if repeat_key is not None and row.fault is None:
            key = repeat_key(row.value)
            if key in seen:
                imported.num_repeats += 1
                continue
            seen.add(key)
        imported.num_rows += 1
        if row.fault is not None:
            imported.bad.append(BadRow(origin, row, row.fault))
            continue
        try:
            item = convert(name, row)
        except ValueError as error:
            # The error shows the columns of the first bad row; keeping all bad rows' values could fill the memory.
            imported.bad.append(BadRow(origin, replace(row, value=None) if has_misfit else row, str(error)))
            has_misfit = True
            continue
        try:
            check(item)
        except ValueError as error:
            imported.bad.append(BadRow(origin, replace(row, value=None), str(error), is_unjudgeable=True))
            continue
        imported.items.append(item)
    return imported


def named_rows(sources: Sequence[RawData]) -> Iterator[tuple[str, str, ForeignRow]]:
    """Yields (name, origin, row). If two sources have one name, the second gets a number, so that ids stay unique."""
    counts: dict[str, int] = {}
    for source in sources:
        counts[source.name] = counts.get(source.name, 0) + 1
        name = source.name if counts[source.name] == 1 else f"{source.name}.{counts[source.name]}"
        for row in source.rows:
            yield name, source.origin, row


def refuse_bad(imported: Imported[Item], format_name: str, skip_bad: int) -> None:
    """Raises ValueError that names the bad rows if there are more than `skip_bad` of them, or if all rows are bad."""
    bad = imported.bad
    if len(bad) <= skip_bad and (imported.items or not bad):
        return
    misfits = [row for row in bad if not row.is_unjudgeable]
    first = (misfits or bad)[0]
    places = shortened(list(map(place_among(bad), bad)))
    advice = f"; --skip-bad {len(bad)} would skip them" if imported.items else ""
    if skip_bad:
        more = f", more than --skip-bad {skip_bad}" if len(bad) > skip_bad else ", and there is no other"
        raise ValueError(f"--input: {len(bad)} bad rows{more}: {places}; the first is {first.describe(format_name)}")
    if misfits:
        others = f"; {len(bad)} rows are bad: {places}{advice}" if len(bad) > 1 else advice.replace("them", "it")
        raise ValueError(f"--input: {first.describe(format_name)}{others}")
    raise ValueError(
        f"--input: {first.origin}: {len(bad)} of {imported.num_rows} answers cannot be judged; the first is "
        f"row {first.row.index}: {first.reason} ({places}{advice})"
    )


def place_among(bad: Sequence[BadRow]) -> Callable[[BadRow], str]:
    """Describes the place of a row; it names the file if there are several."""
    if len({row.origin for row in bad}) == 1:
        return lambda row: row.place
    return lambda row: f"{row.origin} {row.place}"


def shortened(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + rest
