"""Describes what the threads of this process do, even while its main thread hangs."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

PACKAGE = f"{os.sep}megatron_oreal{os.sep}"
# A thread with one of these in its stack waits for other ranks, or for the GPU, which may wait for other ranks.
WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}torch{os.sep}cuda{os.sep}")
OWN_THREADS = ("MainThread", "watchdog", "run lock")  # left out of the list of other threads
MAX_THREADS = 3


@dataclass(slots=True, frozen=True)
class RankState:
    """What a rank does when a hang is found. It is sent to the first rank as JSON."""

    rank: int
    host: str
    phase: str
    step: int
    seconds: float  # since the phase began
    place: str  # of the main thread: "push (weight_sync.py:31)"
    waits: bool  # whether the main thread waits for other ranks or for the GPU
    threads: tuple[str, ...]  # "production in generate (engine.py:140)", of the threads that are in this package
    requests: tuple[str, ...]  # one sentence a server that has not answered


def state_of_process(rank: int, phase: str, step: int, seconds: float, requests: tuple[str, ...]) -> RankState:
    frames = sys._current_frames()
    main = frames.get(threading.main_thread().ident or 0)
    others = [
        (thread.name, found)
        for thread in threading.enumerate()
        if thread.name not in OWN_THREADS and (found := innermost_of_package(frames.get(thread.ident or 0))) is not None
    ]
    # A reward computation is more informative than the rollout that waits for it.
    others.sort(key=lambda one: f"{PACKAGE}rewards{os.sep}" not in one[1].f_code.co_filename)
    threads = tuple(f"{name} in {describe(frame)}" for name, frame in others[:MAX_THREADS])
    place = describe_place(main)
    return RankState(rank, socket.gethostname(), phase, step, seconds, place, waits(main), threads, requests)


def innermost_of_package(frame: FrameType | None) -> FrameType | None:
    """Returns the innermost frame that belongs to this package."""
    while frame is not None and PACKAGE not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame


def waits(frame: FrameType | None) -> bool:
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in WAITING):
            return True
        frame = frame.f_back
    return False


def describe_place(frame: FrameType | None) -> str:
    """Names the innermost function and the function of this package that called it."""
    if frame is None:
        return "no Python code"
    ours = innermost_of_package(frame)
    if ours is None or ours is frame:
        return describe(frame)
    return f"{describe(ours)}, there in {describe(frame)}"


def describe(frame: FrameType) -> str:
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)  # Python 3.10 has no class names here.
    return f"{name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def stacks_of_process() -> str:
    """Returns the stacks of all threads. Reads no source files, because the file system may hang."""
    names = "".join(f"Thread 0x{thread.ident or 0:016x} is {thread.name}\n" for thread in threading.enumerate())
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return f"{names}\n{file.read().decode(errors='replace')}"


def write_where_possible(folder: Path, name: str, text: str, seconds: float) -> Path:
    """Writes a file into `folder`, or into the temporary folder if that does not succeed within `seconds`.

    Returns the path of the file.
    """
    if within(seconds, lambda: write(folder / name, text)):
        return folder / name
    instead = Path(tempfile.gettempdir()) / f"megatron-oreal-{folder.name}-{os.getpid()}-{name}"
    within(seconds, lambda: write(instead, text))
    return instead


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def within(seconds: float, action: Callable[[], object]) -> bool:
    """Runs `action` in a thread; returns whether it ended in time and without an OSError."""
    succeeded = threading.Event()

    def run() -> None:
        try:
            action()
        except OSError:
            return
        succeeded.set()

    thread = threading.Thread(target=run, name="watchdog", daemon=True)
    thread.start()
    thread.join(seconds)
    return succeeded.is_set()
