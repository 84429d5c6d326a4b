"""Tests the file system of a run: whether it supports writing, renaming and locking, and how fast it is."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.doctor.findings import Finding, error, ok, warning

NUM_BYTES = 4 * 2**20  # the size of the test file
SLOW_BYTES = 5e6  # bytes per second; at a lower rate, a checkpoint of one billion parameters takes more than an hour
MIN_FREE_BYTES = 10 * 2**30
FULL_BYTES = 64 * 2**20
MAX_SKEW_SECONDS, HARMFUL_SKEW_SECONDS = 2.0, 60.0
LOCK_SECONDS = 10.0
# This script exits with status 3 if the lock is held. It must be another process, because locks of one process do not
# exclude each other.
TRY_LOCK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    sys.exit(3)
"""


@dataclass(frozen=True, slots=True)
class FileFacts:
    folder: Path
    problem: str = ""  # the error of writing; all other values are then unknown
    bytes_per_second: float = 0.0  # of a file that is written and synchronised
    free_bytes: int = 0
    renames: bool = True  # a rename replaces a file atomically
    creates_once: bool = True  # only one process can create a file (O_EXCL)
    locks: bool = True  # POSIX locks exclude another process
    clock_skew_seconds: float = 0.0  # the file system's clock minus this host's


def try_files(folder: Path) -> FileFacts:
    """Writes into a new folder below `folder`, or below its nearest existing parent, and removes it afterwards."""
    where = folder
    while not where.exists() and where != where.parent:
        where = where.parent
    mine = where / f".doctor-{os.getpid()}-{os.urandom(4).hex()}"
    try:
        mine.mkdir()
    except OSError as raised:
        return FileFacts(where, problem=raised.strerror or str(raised))
    try:
        return try_in(mine, where)
    except OSError as raised:
        return FileFacts(where, problem=raised.strerror or str(raised))
    finally:
        shutil.rmtree(mine, ignore_errors=True)


def try_in(mine: Path, where: Path) -> FileFacts:
    first, second, content = mine / "first", mine / "second", os.urandom(NUM_BYTES)
    start = time.perf_counter()
    with first.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    skew = first.stat().st_mtime - time.time()
    second.write_bytes(b"old")
    os.replace(first, second)
    renames = second.stat().st_size == NUM_BYTES and not first.exists()
    try:
        os.close(os.open(second, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        creates_once = False
    except FileExistsError:
        creates_once = True
    status = os.statvfs(where)
    return FileFacts(
        where,
        bytes_per_second=NUM_BYTES / max(seconds, 1e-9),
        free_bytes=status.f_bavail * status.f_frsize,
        renames=renames,
        creates_once=creates_once,
        locks=excludes(second),
        clock_skew_seconds=skew,
    )


def excludes(file: Path) -> bool:
    """Says whether a lock of this process excludes another process."""
    descriptor = os.open(file, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        command = [sys.executable, "-I", "-S", "-c", TRY_LOCK, str(file)]
        done = subprocess.run(command, capture_output=True, timeout=LOCK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    finally:
        os.close(descriptor)
    return done.returncode == 3


def check_files(facts: FileFacts) -> Iterator[Finding]:
    name, where = "files", f"{facts.folder}"
    if facts.problem:
        yield error(name, f"{where} cannot be written ({facts.problem})", "give another run_dir, or mount it writable")
        return
    free, speed = facts.free_bytes / 2**30, facts.bytes_per_second / 1e6
    if not (facts.renames and facts.creates_once):
        what = "rename a file over another" if not facts.renames else "create a file exclusively"
        yield error(name, f"{where} cannot {what}", "a resume needs that: put run_dir on another file system")
    if not facts.locks:
        fix = "mount NFS with local_lock=none and a lock manager; without, start one run at a time in a run_dir"
        yield warning(name, f"{where} has no POSIX locks", fix)
    if facts.free_bytes < FULL_BYTES:
        yield error(name, f"{where} is full ({free:.2f} GiB free)", "free some, or give another run_dir")
    elif facts.free_bytes < MIN_FREE_BYTES:
        yield warning(name, f"{where} has only {free:.1f} GiB free", "checkpoints need several times the model's size")
    if facts.bytes_per_second < SLOW_BYTES:
        fix = "put run_dir on a parallel file system, or checkpoint less often (checkpoint.every)"
        yield warning(name, f"{where} takes {speed:.1f} MB/s", fix)
    else:
        yield ok(name, f"{where}: {speed:.0f} MB/s, {free:.0f} GiB free")
    if abs(facts.clock_skew_seconds) > MAX_SKEW_SECONDS:
        yield skew("the file system", where, facts.clock_skew_seconds)


def skew(what: str, where: str, seconds: float) -> Finding:
    """Returns the finding about a clock difference. Locks of other hosts are judged by their age in seconds."""
    message = f"the clock of {what} {where} differs by {seconds:+.1f} s"
    kind = error if abs(seconds) > HARMFUL_SKEW_SECONDS else warning
    return kind("clocks", message, "synchronise the clocks (chrony, ntp): locks and certificates depend on them")
