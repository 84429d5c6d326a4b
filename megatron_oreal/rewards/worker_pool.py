"""Compares answers with an algebra system in worker processes, so that its faults do not affect the trainer.

Each of a few threads owns one process, started at the first comparison, and talks to it over two pipes. A process uses
at most `cpu_seconds` of its own CPU time per comparison (see `worker`), so a loaded machine does not change verdicts; a
long wall-clock limit ends a process that hangs without computing. The pool replaces a process that has ended.
"""

from __future__ import annotations

import json
import os
import select
import signal
import site
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oreal.rewards.process_pool import JOBS_PER_PROCESS as JOBS_PER_PROCESS
from megatron_oreal.rewards.process_pool import NUM_ATTEMPTS, ProcessPool

WORKER_SCRIPT = Path(__file__).with_name("worker.py")
START_SECONDS = 180.0  # enough for imports from a slow shared file system
DEFAULT_MEMORY_BYTES = 2 * 2**30  # of address space
# Variables of Python and the dynamic linker; a worker gets nothing else of a launcher's environment.
INHERITED_VARIABLES = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

NO_HOME = "/nonexistent"
MAX_REMEMBERED_REFERENCES = 10_000

# "slow_reference": the reference answer alone uses up the budget, independent of the answer compared with it.
Outcome = Literal["equal", "different", "timeout", "slow_reference", "crash"]


OUTCOME_OF_REPLY: dict[bool | None, Outcome] = {True: "equal", False: "different", None: "crash"}


@dataclass(slots=True, frozen=True)
class Comparison:
    answer: str  # the reference
    prediction: str


class WorkerProcess:
    """One process. Raises RuntimeError if it does not start; the installation causes that, not an answer."""

    def __init__(self, cpu_seconds: float, wall_seconds: float, memory_bytes: int, function: str = "") -> None:
        self.wall_seconds = wall_seconds
        self.num_jobs = 0
        self.unread = b""  # bytes from the process that are not read yet
        self.is_closed = False  # True after the process has closed its end of the pipe
        # An argument list needs no shell. The hash seed is fixed because sympy's orders depend on hashes.
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(WORKER_SCRIPT),
                f"--parent-pid={os.getpid()}",
                f"--cpu-seconds={cpu_seconds}",
                f"--memory-bytes={memory_bytes}",
                f"--function={function}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # the trainer handles Ctrl-C, also while this process starts
            env={name: os.environ[name] for name in INHERITED_VARIABLES if name in os.environ}
            # PYTHONUSERBASE leads Python to the user's own packages; HOME, a folder with secrets, is hidden.
            | {"HOME": NO_HOME, "PYTHONUSERBASE": site.getuserbase()}
            | {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8"}
            | dict.fromkeys(THREAD_COUNTS, "1"),  # a worker must not start threads
        )
        ready = self.read_line(START_SECONDS)
        if ready is None:
            self.end()
            raise RuntimeError(
                f"the verifier's worker did not start (exit status {self.process.returncode}); its error is on stderr. "
                "Is math-verify[antlr4_13_2] installed in this environment?"
            )
        if error := json.loads(ready).get("error"):
            self.end()
            raise ValueError(error)

    def compare(self, comparison: Comparison) -> Outcome:
        """Compares an answer. The process has ended after "timeout", "slow_reference" and most cases of "crash"."""
        if not self.send({"answer": comparison.answer, "prediction": comparison.prediction}):
            return "crash"
        is_reference_done = False
        while (line := self.read_line(self.wall_seconds)) is not None:
            reply = json.loads(line)
            if "is_equal" in reply:
                return OUTCOME_OF_REPLY[reply["is_equal"]]
            is_reference_done = True
        ran_on = self.end_in_time()
        if ran_on:
            return "timeout"
        if not self.spent_its_budget:
            return "crash"
        return "timeout" if is_reference_done else "slow_reference"

    def send(self, job: dict[str, Any]) -> bool:
        """Sends a job; returns False if the process has ended."""
        self.num_jobs += 1
        assert self.process.stdin is not None
        rest = memoryview(json.dumps(job).encode() + b"\n")
        try:
            while rest:
                rest = rest[self.process.stdin.write(rest) :]
        except BrokenPipeError:
            self.end()
            return False
        return True

    def end_in_time(self) -> bool:
        """Ends a process that did not reply; returns whether it was still running, and so had used up its wall time."""
        ran_on = self.process.poll() is None and not self.is_closed
        self.end()
        return ran_on

    @property
    def spent_its_budget(self) -> bool:
        """Returns whether the ended process had used up its CPU time."""
        return self.process.returncode == -signal.SIGPROF

    def read_line(self, timeout_seconds: float) -> bytes | None:
        """Returns the next reply; None if the process has ended (then `is_closed` is set) or the time is over."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self.unread:
            readable, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                return None
            part = self.process.stdout.read(65536)
            if not part:
                self.is_closed = True
                return None
            self.unread += part
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Kills the process and waits for it, so that no zombie and no open pipe remain."""
        # A process that closed its pipe is ending already, and its own signal gives the reason.
        if not self.is_closed:
            self.process.kill()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class WorkerPool(ProcessPool[Comparison, Outcome, WorkerProcess]):
    """Compares answers in up to `num_workers` processes. Several threads may call the methods."""

    def __init__(
        self,
        num_workers: int = 1,
        cpu_seconds: float = 3.0,
        wall_seconds: float | None = None,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
    ) -> None:
        if cpu_seconds <= 0:
            raise ValueError(f"verifier.cpu_seconds must be > 0, got {cpu_seconds}")
        super().__init__(num_workers)
        self.cpu_seconds = cpu_seconds
        self.wall_seconds = default_wall_seconds(cpu_seconds) if wall_seconds is None else wall_seconds
        self.memory_bytes = memory_bytes
        # For each reference answer, the result of its first comparison; None while that runs.
        self.is_slow: dict[str, bool | None] = {}
        self.reference_known = threading.Condition()

    def compare_many(self, comparisons: Sequence[Comparison]) -> list[Outcome]:
        """Returns outcomes in the given order. Raises RuntimeError if no worker can be started, or after `close`."""
        return [future.result() for future in self.submit_many(comparisons)]

    def start_process(self) -> WorkerProcess:
        return WorkerProcess(self.cpu_seconds, self.wall_seconds, self.memory_bytes)

    def answer(self, index: int, comparison: Comparison) -> Outcome:
        """Compares after the reference's first comparison has ended, so that a slow reference ends only one worker."""
        with self.reference_known:
            while comparison.answer in self.is_slow and self.is_slow[comparison.answer] is None:
                self.reference_known.wait()
            is_first = comparison.answer not in self.is_slow
            if not is_first and self.is_slow[comparison.answer]:
                return "slow_reference"
            if is_first:
                self.forget_references()
                self.is_slow[comparison.answer] = None
        outcome: Outcome = "crash"
        try:
            outcome = self.attempt(index, comparison)
        finally:
            if is_first or outcome == "slow_reference":
                with self.reference_known:
                    self.is_slow[comparison.answer] = outcome == "slow_reference"
                    self.reference_known.notify_all()
        return outcome

    def forget_references(self) -> None:
        if len(self.is_slow) >= MAX_REMEMBERED_REFERENCES:
            self.is_slow = {answer: slow for answer, slow in self.is_slow.items() if slow is None}

    def attempt(self, index: int, comparison: Comparison) -> Outcome:
        outcome: Outcome = "crash"
        for _ in range(NUM_ATTEMPTS):
            if self.is_closed:
                raise RuntimeError("the verifier was closed during a comparison")
            worker = self.running_worker(index)
            outcome = worker.compare(comparison)
            # A reply that says "crash" comes from a running process; a second attempt would give the same.
            if outcome != "crash" or worker.is_running:
                break
        return outcome


def default_wall_seconds(cpu_seconds: float) -> float:
    """Returns the wall-clock limit for a hanging process, long enough that a busy machine does not reach it."""
    return 30.0 + 30.0 * cpu_seconds
