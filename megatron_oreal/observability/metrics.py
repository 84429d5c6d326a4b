"""Measures the durations of a step's phases, and writes one record of numbers per step to RUN_DIR/metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_oreal.observability.closing import Closing
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.tensorboard import TensorBoard
from megatron_oreal.observability.trackers import Tracker
from megatron_oreal.types import Metrics as Metrics

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class PhaseTimer:
    """Splits a step's wall time into disjoint phases: `with timer("rollout"): ...`.

    CUDA runs asynchronously. `synchronize`, called at the beginning and the end of a phase, makes each phase include
    its own GPU work. `on_phase` receives the name of each phase that begins, and "other" when one ends.
    """

    def __init__(
        self,
        synchronize: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] = lambda _phase: None,
    ) -> None:
        self.synchronize, self.on_phase = synchronize, on_phase
        self.clock = clock
        self.seconds: dict[str, float] = {}
        self.running: str | None = None
        self.running_since = 0.0  # as `clock` measures
        self.last_flush = self.now()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to `phase`, even if the block raises."""
        assert self.running is None, f"phases are disjoint: {phase!r} begins inside {self.running!r}"
        assert phase not in ("other", "step"), f"{phase!r} is a name that flush() uses"
        self.running_since = start = self.now()
        self.running = phase
        self.on_phase(phase)
        try:
            yield
        finally:
            self.running = None
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start
            self.on_phase("other")

    def under_way(self) -> tuple[str, float]:
        """Returns the current phase and its seconds so far, or ("other", 0). Any thread may call this."""
        phase, since = self.running, self.running_since
        return ("other", 0.0) if phase is None else (phase, self.clock() - since)

    def flush(self) -> Metrics:
        """Returns seconds since the last flush: of each phase, of the rest, and their sum (`time/step_seconds`)."""
        assert self.running is None, f"flush() inside the phase {self.running!r}"
        now = self.now()
        step_seconds = now - self.last_flush
        seconds, self.seconds, self.last_flush = self.seconds, {}, now
        other_seconds = max(0.0, step_seconds - sum(seconds.values()))
        seconds |= {"other": other_seconds, "step": step_seconds}
        return {f"time/{phase}_seconds": value for phase, value in seconds.items()}

    def now(self) -> float:
        if self.synchronize is not None:
            self.synchronize()
        return self.clock()


class MetricsLog(Closing):
    """Writes one JSON object per step to `metrics.jsonl`, and the same numbers to TensorBoard and the trackers.

    JSON has no NaN and no infinity; they are written as the strings "nan", "inf" and "-inf". A line is on disk when
    `log` returns. A run resumed at `start_step` first drops the records from that step on, so that each step has one
    record.
    """

    def __init__(self, run_dir: Path, start_step: int) -> None:
        """Raises ValueError if an existing metrics.jsonl is damaged before its last line."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = metrics_path(run_dir)
        kept = [record for record in read_metrics(run_dir) if record["step"] < start_step]
        write_atomically(path, "".join(map(encode, kept)))
        self.last_step = start_step - 1
        self.file = path.open("ab")
        self.tensorboard = TensorBoard(run_dir, start_step)
        self.trackers: list[Tracker] = []  # their owner closes them

    @staticmethod
    def silent() -> MetricsLog:
        """Returns a log that writes nothing, for every rank but the first."""
        return SilentMetricsLog()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends the record of `step`; steps increase. Values are numbers or one-element tensors."""
        assert step > self.last_step, f"step {step} is logged after step {self.last_step}"
        assert "step" not in metrics, "the record's own key"
        record = {"step": step} | {name: as_number(value) for name, value in metrics.items()}
        self.file.write(encode(record).encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.last_step = step
        self.tensorboard.scalars(record, step)
        for tracker in self.trackers:
            tracker.log(record)

    def upload(self, file: Path) -> None:
        """Uploads a copy of the file to the trackers."""
        for tracker in self.trackers:
            tracker.upload(file)

    def text(self, tag: str, text: str, step: int) -> None:
        """Shows `text`, for example an answer of the policy, in TensorBoard."""
        self.tensorboard.text(tag, text, step)

    def close(self) -> None:
        self.file.close()
        self.tensorboard.close()


class SilentMetricsLog(MetricsLog):
    def __init__(self) -> None:
        self.trackers = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def text(self, tag: str, text: str, step: int) -> None:
        pass

    def close(self) -> None:
        pass


def metrics_path(run_dir: Path) -> Path:
    return run_dir / "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[Metrics]:
    """Reads the records of a run, finished or not; returns none for a run without a metrics.jsonl.

    Leaves out a torn last line, which a killed or a writing run may have. Any other damage raises ValueError.
    """
    path = metrics_path(run_dir)
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(decode(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path} line {number} is not a metrics record ({error}): delete the line") from None
    return records


def as_number(value: float) -> float:
    """Converts a number or a tensor with one element to a plain int or float."""
    return value if isinstance(value, int) else float(value)


def encode(record: Mapping[str, float]) -> str:
    plain = {name: value if math.isfinite(value) else str(value) for name, value in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def decode(line: bytes) -> Metrics:
    record = json.loads(line)
    if not isinstance(record, dict) or "step" not in record:
        raise ValueError("no object with a step")
    return {name: decode_number(value) for name, value in record.items()}


def decode_number(value: object) -> float:
    if isinstance(value, str) and value in NOT_FINITE:
        return NOT_FINITE[value]
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return value
