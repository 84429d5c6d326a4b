"""Shows the progress of a run: a bar on a terminal, plain lines elsewhere, and timestamped lines in a log file."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NoReturn, TextIO

from tqdm import tqdm

from megatron_oreal.observability.closing import Closing
from megatron_oreal.observability.printable import printable


class ProgressBar(Closing):
    """Counts from `initial` to `total` in `unit`s, with rate, time left and a few numbers. One process of a run has it.

    A terminal shows a bar. Elsewhere, and always in `log_file`, it writes a line at the first and the last unit and
    every `line_every_seconds` in between.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        description: str = "",
        log_file: Path | None = None,
        unit: str = "step",
        *,
        line_every_seconds: float = 10.0,
        stream: TextIO | None = None,
    ) -> None:
        self.total, self.initial, self.count = total, initial, initial
        self.description, self.unit = printable(description), unit
        self.line_every_seconds = line_every_seconds
        self.start = time.monotonic()
        self.last_line: float | None = None
        self.unwritten = ""
        self.stream = stream or sys.stderr
        self.bar: tqdm[NoReturn] | None = None
        if self.stream.isatty():
            self.bar = tqdm(
                total=total, initial=initial, desc=self.description, unit=unit, file=self.stream, dynamic_ncols=True
            )
        self.log: TextIO | None = None
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            # Line buffering lets `tail -f` show each line at once
            self.log = log_file.open("a", encoding="utf-8", buffering=1)

    @staticmethod
    def silent() -> ProgressBar:
        """Returns a progress bar that does nothing, for every rank but the first."""
        return SilentProgressBar()

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        """Adds `n` units; `postfix` holds the numbers to show beside them."""
        self.count += n
        if self.bar is not None:
            self.bar.set_postfix({name: format_value(value) for name, value in postfix.items()}, refresh=False)
            self.bar.update(n)
        now = time.monotonic()
        self.unwritten = self.status(now - self.start, postfix)
        is_due = self.last_line is None or now - self.last_line >= self.line_every_seconds
        if is_due or self.count >= self.total:
            self.write_status()

    def note(self, line: str) -> None:
        """Prints a line above the bar."""
        line = printable(line)
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        self.write_line(line)

    def close(self) -> None:
        if self.unwritten:
            self.write_status()
        if self.bar is not None:
            self.bar.close()
        if self.log is not None:
            self.log.close()
            self.log = None

    def status(self, elapsed_seconds: float, postfix: dict[str, float | str]) -> str:
        parts = [f"{self.description} {self.count}/{self.total} {self.unit}".strip()]
        done = self.count - self.initial
        if done > 0 and elapsed_seconds > 0:
            parts.append(format_rate(done / elapsed_seconds, self.unit))
            parts.append(f"{tqdm.format_interval((self.total - self.count) * elapsed_seconds / done)} left")
        parts += [f"{name}={format_value(value)}" for name, value in postfix.items()]
        return ", ".join(parts)

    def write_status(self) -> None:
        self.write_line(self.unwritten)
        self.unwritten = ""
        self.last_line = time.monotonic()

    def write_line(self, line: str) -> None:
        stamped = f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(line)}\n"
        if self.bar is None:
            self.stream.write(stamped)
            self.stream.flush()
        if self.log is not None:
            self.log.write(stamped)


class Announcer:
    """Prints lines for the user, from any thread: on stderr until there is a progress bar, then above the bar."""

    def __init__(self, is_main: bool, log_file: Path) -> None:
        self.is_main, self.log_file = is_main, log_file
        self.progress: ProgressBar | None = None

    def __call__(self, line: str) -> None:
        if not self.is_main:
            return
        if self.progress is not None:
            self.progress.note(line)
            return
        stamped = f"{datetime.now():%Y-%m-%d %H:%M:%S} {printable(line)}\n"
        sys.stderr.write(stamped)
        with self.log_file.open("a", encoding="utf-8") as log:
            log.write(stamped)


class SilentProgressBar(ProgressBar):
    def __init__(self) -> None:
        pass

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def close(self) -> None:
        pass


def format_value(value: float | str) -> str:
    return printable(value) if isinstance(value, str) else f"{value:.4g}"


def format_rate(per_second: float, unit: str) -> str:
    return f"{per_second:.2f} {unit}/s" if per_second >= 1 else f"{1 / per_second:.2f} s/{unit}"
