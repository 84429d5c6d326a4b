"""Sends a run's records and files to an experiment tracker, without making the training wait.

A tracker's client (MLflow, W&B) runs in its own thread; TensorBoard writes directly. The training only puts records
into a queue. If a client fails, the run logs one line, and the client's thread tries again every `retry_seconds`. The
queue holds at most `capacity` records; the oldest ones beyond that are dropped and counted. `metrics.jsonl` has all
records in any case, and a resumed run sends the tracker the records that it lacks.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

from megatron_oreal.observability.closing import Closing
from megatron_oreal.parallel.stopping import RunStopped
from megatron_oreal.types import Metrics, Notify

Outcome = Literal["finished", "failed", "stopped"]  # stopped: the user is expected to resume the run
BATCH_RECORDS = 10  # that a client receives in one call
CAPACITY = 2000  # records; with 150 numbers each, they take 30 MiB
RETRY_SECONDS = 30.0
CLOSE_SECONDS = 60.0  # for a client that works
FAILED_CLOSE_SECONDS = 10.0  # for a client whose last call failed


class TrackerClient(Protocol):
    """Speaks to one kind of tracker. One thread calls all methods, and repeats a call that raised an exception."""

    name: str

    def open(self) -> int:
        """Starts or continues the tracker's run; returns the last step that it has, or -1 if it has none."""

    def log(self, records: Sequence[Metrics]) -> None:
        """Sends records with increasing steps; each record has its "step"."""

    def upload(self, file: Path) -> None:
        """Uploads a copy of the file to the run, replacing an older one of the same name."""

    def close(self, outcome: Outcome) -> None:
        """Sends the remaining records and the outcome of the run."""


class Tracker(Closing):
    """A client's queue and the thread that empties it. The main thread calls the methods.

    past: the records of the steps before this start; the client gets those that the tracker lacks.
    """

    def __init__(
        self,
        client: TrackerClient,
        notify: Notify,
        past: Iterable[Metrics] = (),
        *,
        capacity: int = CAPACITY,
        retry_seconds: float = RETRY_SECONDS,
        close_seconds: float = CLOSE_SECONDS,
        failed_close_seconds: float = FAILED_CLOSE_SECONDS,
    ) -> None:
        self.client, self.notify = client, notify
        self.retry_seconds = retry_seconds
        self.close_seconds, self.failed_close_seconds = close_seconds, failed_close_seconds
        self.records = deque(past)
        self.capacity = capacity + len(self.records)
        self.files: dict[Path, None] = {}  # files to upload, in order
        self.num_dropped = 0
        self.last_step: int | None = None  # the tracker's last step; None before it is opened
        self.is_failing = self.has_warned = self.is_closing = False
        self.outcome: Outcome = "finished"
        self.changed = threading.Condition()  # guards all fields above
        self.thread = threading.Thread(target=self._work, name=f"tracker-{client.name}", daemon=True)
        self.thread.start()

    def log(self, record: Metrics) -> None:
        """Queues the record of a step, which must not change afterwards. Returns at once."""
        with self.changed:
            self.records.append(record)
            self._drop_oldest()
            self.changed.notify()

    def upload(self, file: Path) -> None:
        """Queues a file, which is read later. Returns at once."""
        with self.changed:
            self.files[file] = None
            self.changed.notify()

    def close(self) -> None:
        """Waits until everything is sent, at most `close_seconds`, and logs what was not sent."""
        if self.is_closing:
            return
        with self.changed:
            self.is_closing = True
            wait_seconds = self.failed_close_seconds if self.is_failing else self.close_seconds
            self.changed.notify()
        self.thread.join(wait_seconds)
        with self.changed:
            num_left = len(self.records) + self.num_dropped
        if num_left or self.files or self.thread.is_alive():
            self.notify(
                f"{self.client.name} has not got everything ({num_left} records, {len(self.files)} files): "
                "metrics.jsonl in the run directory has all records"
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None:
            stops = (RunStopped, KeyboardInterrupt, SystemExit)
            self.outcome = "stopped" if issubclass(kind, stops) else "failed"
        self.close()

    def _drop_oldest(self) -> None:
        while len(self.records) > self.capacity:
            self.records.popleft()
            self.num_dropped += 1

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.last_step is None or self.records or self.files or self.is_closing)
            try:
                is_over = self._send()
            except Exception as error:  # noqa: BLE001  # the training must continue, whatever a tracker raises
                self._warn(error)
                with self.changed:
                    self.is_failing = True
                    if self.is_closing:
                        return
                deadline = time.monotonic() + self.retry_seconds
                with self.changed:
                    self.changed.wait_for(lambda: self.is_closing, max(0.0, deadline - time.monotonic()))
                continue
            with self.changed:
                self.is_failing = False
            if is_over:
                return

    def _send(self) -> bool:
        """Sends the queued items; returns whether the client was closed, after which nothing remains to do."""
        if self.last_step is None:
            self.last_step = self.client.open()
        while batch := self._take():
            try:
                self.client.log(batch)
            except BaseException:
                with self.changed:
                    self.records.extendleft(reversed(batch))
                    self._drop_oldest()
                raise
            self.last_step = int(batch[-1]["step"])
        while self.files:
            file = next(iter(self.files))
            self.client.upload(file)
            with self.changed:
                del self.files[file]
        with self.changed:
            is_over = self.is_closing and not self.records and not self.files
        if is_over:
            self.client.close(self.outcome)
        return is_over

    def _take(self) -> list[Metrics]:
        """Takes the oldest records from the queue, except those that the tracker has."""
        assert self.last_step is not None
        batch: list[Metrics] = []
        with self.changed:
            while self.records and len(batch) < BATCH_RECORDS:
                record = self.records.popleft()
                if record["step"] > self.last_step:
                    batch.append(record)
        return batch

    def _warn(self, error: Exception) -> None:
        if self.has_warned:
            return
        self.has_warned = True
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        self.notify(
            f"{self.client.name} does not take the run's records ({reason[:300]}); the training goes on, and it is "
            f"tried again every {self.retry_seconds:g} seconds"
        )
