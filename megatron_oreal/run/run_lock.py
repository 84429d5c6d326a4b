"""Ensures that only one run uses a run directory, also when several nodes share it through a network file system.

RUN_DIR/run.lock names the process that owns the directory. The process creates the file with O_EXCL, which network file
systems support. The owner touches the file every few seconds and holds a POSIX lock on it where the file system has
such locks. A killed run leaves the file behind. The next start replaces it if the owner's process has ended, or, if the
owner ran on another host, once nobody has touched the file for STALE_SECONDS.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

LOCK = "run.lock"
HEARTBEAT_SECONDS = 20.0  # between two touches of the file
STALE_SECONDS = 300.0  # A lock of another host counts as abandoned above this age.
TRIES = 20  # A try fails only if another process changes the lock at the same moment.


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a lock. Its id alone does not identify it, because each host reuses its own ids."""

    host: str
    boot: str  # identifies the host where several have the same name
    process: int
    started: str  # the start of the process, in the system's clock ticks; empty where the system does not report it
    since: str  # when the process took the lock; for the user


class RunLock:
    """A lock that this process holds; `release` removes it."""

    def __init__(self, path: Path, descriptor: int, content: bytes) -> None:
        self.path, self.descriptor, self.content = path, descriptor, content
        self.is_released = threading.Event()
        self.heartbeat = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.heartbeat.start()

    def _beat(self) -> None:
        while not self.is_released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # A file server that fails now may answer at the next touch.
                os.utime(self.descriptor)

    def release(self) -> None:
        self.is_released.set()
        self.heartbeat.join()
        with contextlib.suppress(OSError):
            if self.path.read_bytes() == self.content:  # Otherwise another run has replaced the lock meanwhile.
                self.path.unlink()
        os.close(self.descriptor)


def take_lock(folder: Path) -> RunLock:
    """Takes the lock of a run directory. Raises ValueError, naming host and process, while another run holds it."""
    path = folder / LOCK
    for _ in range(TRIES):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            replace_if_abandoned(path)
            continue
        except OSError as error:
            raise ValueError(f"run_dir: {path} cannot be written ({error.strerror}); give another run_dir") from None
        content = json.dumps(asdict(this_process())).encode()
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        except OSError:
            path.unlink()
            os.close(descriptor)
            raise
        with contextlib.suppress(OSError):  # Some file systems have no POSIX locks.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return RunLock(path, descriptor, content)
    raise ValueError(f"run_dir: other processes keep changing {path}; start one run at a time in a run_dir")


def replace_if_abandoned(path: Path) -> None:
    """Removes the lock of a run that has ended. Raises ValueError if the run still goes on."""
    try:
        content, age = path.read_bytes(), time.time() - path.stat().st_mtime
        owner = read_owner(content)
        if is_held(path, owner, age):
            raise ValueError(describe_owner(path, owner, age))
        seen = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        path.rename(seen)
    except FileNotFoundError:  # The owner has just released the lock, or another start has replaced it.
        return
    except OSError as error:
        raise ValueError(f"run_dir: {path} cannot be read ({error.strerror}); remove it if no run uses it") from None
    if seen.read_bytes() != content:  # Another start was faster and owns this lock.
        with contextlib.suppress(FileExistsError):
            os.link(seen, path)
    seen.unlink()


def read_owner(content: bytes) -> Owner | None:
    """Returns the owner that the file names, or None if the owner has not finished writing the file."""
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError):
        return None


def is_held(path: Path, owner: Owner | None, age_seconds: float) -> bool:
    if is_locked(path):
        return True
    here = this_process()
    if owner is not None and (owner.host, owner.boot) == (here.host, here.boot):
        started = process_start(owner.process)
        return started is not None and started == owner.started
    return age_seconds < STALE_SECONDS


def is_locked(path: Path) -> bool:
    """Says whether a living process holds the POSIX lock; False also where the file system has no such locks."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(descriptor)
    return False


def describe_owner(path: Path, owner: Owner | None, age_seconds: float) -> str:
    who = "another process" if owner is None else f"process {owner.process} on {owner.host} since {owner.since}"
    message = f"run_dir: {path.parent} is in use by {who}; wait for its end, stop it, or choose another run_dir"
    if owner is None or owner.host != this_process().host:
        message += (
            f" (it gave a sign of life {max(0.0, age_seconds):.0f} s ago; a run counts as ended after "
            f"{STALE_SECONDS:.0f} s without one, or when you remove {path})"
        )
    return message


def this_process() -> Owner:
    process = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return Owner(socket.gethostname(), boot_id(), process, process_start(process) or "", since)


def boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # The system is not Linux.
        return ""


def process_start(process: int) -> str | None:
    """Returns when a process of this host started, "" where the system does not report it, or None if it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        # A zombie has ended, but its parent has not read its exit status.
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""
