"""Ends a run that hangs, and reports where. A thread in every rank knows the phase and its deadline.

When a phase exceeds its deadline on one rank, all ranks write the stacks of their threads and the state of their
servers to RUN_DIR/hangs. The first rank names the phase, rank and server in one line, and the run ends with exit code
75, after which examples/slurm requeues it. The main threads take no part, because they hang.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from megatron_oreal.config import WatchdogConfig
from megatron_oreal.observability.closing import Closing
from megatron_oreal.observability.hang_channel import Hang, HangChannel
from megatron_oreal.observability.printable import printable
from megatron_oreal.observability.stacks import (
    RankState,
    stacks_of_process,
    state_of_process,
    within,
    write_where_possible,
)
from megatron_oreal.parallel.stopping import REQUEUE

FOLDER = "hangs"
STDERR = 2
WRITE_SECONDS = 5.0  # for writing one file, because the file system may hang
GATHER_SECONDS = 30.0  # for the states of the other ranks
MAX_POLL_SECONDS = 5.0
MAX_NAMED_RANKS = 3
MAX_HANGS_OF_A_STEP = 3  # After this many, the run exits with code 1, because a person must examine a hang that recurs.


class Deadlines:
    """The longest duration of each phase."""

    def __init__(self, config: WatchdogConfig) -> None:
        self.least, self.factor = config.least_seconds(), config.factor
        self.longest: dict[str, float] = {}

    def of(self, phase: str) -> float | None:
        """Returns the seconds that the phase may take; None means no limit."""
        least = self.least.get(phase)
        return None if least is None else max(least, self.factor * self.longest.get(phase, 0.0))

    def ended(self, phase: str, seconds: float) -> None:
        self.longest[phase] = max(seconds, self.longest.get(phase, 0.0))

    @property
    def poll_seconds(self) -> float:
        return min(MAX_POLL_SECONDS, *(seconds / 10 for seconds in self.least.values()))


class Watchdog(Closing):
    """Watches the phases of this rank. The main thread calls `enter`; `close` ends the watch."""

    def __init__(self, config: WatchdogConfig, run_dir: Path, channel: HangChannel) -> None:
        self.run_dir, self.channel, self.rank = run_dir, channel, channel.rank
        self.deadlines = Deadlines(config)
        self.phase, self.since = "start", time.monotonic()
        self.step = 0
        # What this rank knows about servers: sentences about those that have not answered, and lines of details.
        self.server_states: Callable[[], tuple[Sequence[str], Sequence[str]]] = lambda: ((), ())
        self.at_end: list[Callable[[], None]] = []  # called shortly before the process ends
        self.lock = threading.Lock()  # guards phase and since
        self.is_closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self.deadlines.least:
            self.thread.start()

    def enter(self, phase: str) -> None:
        """Ends the current phase and begins `phase`."""
        with self.lock:
            now = time.monotonic()
            self.deadlines.ended(self.phase, now - self.since)
            self.phase, self.since = phase, now

    def close(self) -> None:
        self.is_closed.set()

    def _watch(self) -> None:
        while not self.is_closed.wait(self.deadlines.poll_seconds):
            hang = self._overdue()
            hang = self.channel.found() if hang is None else self.channel.tell(hang)
            if hang is not None and not self.is_closed.is_set():
                self._end(hang)

    def _overdue(self) -> Hang | None:
        with self.lock:
            phase, seconds, deadline = self.phase, time.monotonic() - self.since, self.deadlines.of(self.phase)
        if deadline is None or seconds <= deadline:
            return None
        name = f"step_{self.step:06d}_{phase}_{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
        return Hang(name, self.rank, phase, self.step, seconds, deadline)

    def _end(self, hang: Hang) -> None:
        """Writes what this rank knows; the first rank waits for the others and describes the hang. Never returns."""
        with self.lock:
            phase, seconds = self.phase, time.monotonic() - self.since
        sentences, details = self.server_states()
        state = state_of_process(self.rank, phase, self.step, seconds, tuple(sentences))
        folder = self.run_dir / FOLDER / hang.name
        text = f"{summary(state)}\n\n{stacks_of_process()}\n" + "".join(f"{line}\n" for line in details)
        file = write_where_possible(folder, f"rank_{self.rank:05d}.txt", text, WRITE_SECONDS)
        self.channel.publish(state)
        patience = min(GATHER_SECONDS, max(2.0, hang.deadline))
        if self.rank == 0:
            states = self.channel.gather(state, patience)
            self._tell(hang, describe_hang(hang, states, self.channel.world_size), file)
            self.channel.finish()
        elif not self.channel.is_over(patience + 4 * WRITE_SECONDS) and hang.rank == self.rank:
            self._tell(hang, describe_hang(hang, {self.rank: state}, self.channel.world_size), file)
        os._exit(REQUEUE)

    def _tell(self, hang: Hang, description: str, file: Path) -> None:
        """Prints the line, and writes it to log.txt and beside the stacks. Ends the process after too many hangs."""
        folder = self.run_dir / FOLDER
        counts: list[int] = []
        within(WRITE_SECONDS, lambda: counts.append(hangs_of_step(folder, hang.step)))
        comes_back = bool(counts) and counts[0] >= MAX_HANGS_OF_A_STEP
        end = (
            f"it is hang {counts[0]} of this step, so the run is not put back into the queue"
            if comes_back
            else "the same command continues from the last checkpoint"
        )
        line = printable(f"Error: hang: {description}; the stacks of all ranks are in {file.parent}; {end}")
        # A hanging thread may hold the lock of sys.stderr
        within(WRITE_SECONDS, lambda: os.write(STDERR, f"{line}\n".encode()))
        within(WRITE_SECONDS, lambda: append(self.run_dir / "log.txt", f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n"))
        write_where_possible(file.parent, "hang.txt", f"{line}\n", WRITE_SECONDS)
        for action in self.at_end:
            within(WRITE_SECONDS, action)
        if comes_back:
            os._exit(1)


def hangs_of_step(folder: Path, step: int) -> int:
    """Returns the number of the run's hangs in this step, including this one."""
    return sum(re.match(rf"step_{step:06d}_", path.name) is not None for path in folder.iterdir())


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def summary(state: RankState) -> str:
    return (
        f"rank {state.rank} on {state.host}: {state.phase} of step {state.step} for {state.seconds:.0f} s, main thread "
        f"in {state.place}"
    )


def describe_hang(hang: Hang, states: Mapping[int, RankState], world_size: int) -> str:
    """Names in one line the phase that exceeded its deadline, the rank that caused it, and the server.

    The cause is a rank that does not respond; otherwise a rank that does not wait for other ranks while others do. If
    all ranks wait, they wait for each other.
    """
    begun = (
        f"{hang.phase} of step {hang.step} has taken {hang.seconds:.1f} s on rank {hang.rank}, more than its deadline "
        f"of {hang.deadline:g} s"
    )
    silent = [rank for rank in range(world_size) if rank not in states]
    busy = [state for _, state in sorted(states.items()) if not state.waits]
    if silent:
        shown = ", ".join(map(str, silent[:MAX_NAMED_RANKS])) + (", ..." if len(silent) > MAX_NAMED_RANKS else "")
        blamed = [f"rank{'s' if len(silent) > 1 else ''} {shown} gave no sign of life"]
    elif busy:
        blamed = [what_it_does(state, hang) for state in busy[:MAX_NAMED_RANKS]]
    else:
        blamed = ["all ranks wait for each other or for their GPUs"]
        blamed += [what_it_does(state, hang) for _, state in sorted(states.items())[:MAX_NAMED_RANKS]]
    requests = [sentence for _, state in sorted(states.items()) for sentence in state.requests]
    return "; ".join([begun, *blamed, *requests[:MAX_NAMED_RANKS]])


def what_it_does(state: RankState, hang: Hang) -> str:
    elsewhere = "" if (state.phase, state.step) == (hang.phase, hang.step) else f" ({state.phase} of step {state.step})"
    threads = "".join(f", thread {thread}" for thread in state.threads)
    return f"rank {state.rank} on {state.host} is in {state.place}{elsewhere}{threads}"
