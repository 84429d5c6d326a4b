"""Lets one run at a time use a run directory, also where several nodes see it through a network file system.

RUN_DIR/run.lock names the process that owns the directory. The file is created with O_EXCL, which network file systems
honour. The owner touches it every few seconds and holds a POSIX lock on it where the file system has such locks. A
killed run leaves the file behind; the next start replaces it when the owner's process is gone, or, when the owner ran
on another host, once nobody has touched the file for STALE_SECONDS.
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
HEARTBEAT_SECONDS = 20.0  # Between two touches of the file.
STALE_SECONDS = 300.0  # A lock of another host counts as abandoned when it is older.
TRIES = 20  # Each one fails only when another process changes the lock at the same moment.


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a lock. A process id alone says little: each host has it, and gives it out again."""

    host: str
    boot: str  # It tells hosts of one name apart.
    process: int
    started: str  # When the process started, in the system's own clock ticks; empty where the system does not say.
    since: str  # When it took the lock, for the user.


class RunLock:
    """A lock that this process holds; `release` gives the directory back."""

    def __init__(self, path: Path, descriptor: int, content: bytes) -> None:
        self.path, self.descriptor, self.content = path, descriptor, content
        self.is_released = threading.Event()
        self.heartbeat = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self.heartbeat.start()

    def _beat(self) -> None:
        while not self.is_released.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # A server that does not answer now may do so at the next beat.
                os.utime(self.descriptor)

    def release(self) -> None:
        self.is_released.set()
        self.heartbeat.join()
        with contextlib.suppress(OSError):
            if self.path.read_bytes() == self.content:  # Otherwise another run has taken it over in the meantime.
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
    """Removes the lock of a run that has ended. Raises ValueError for one of a run that goes on."""
    try:
        content, age = path.read_bytes(), time.time() - path.stat().st_mtime
        owner = read_owner(content)
        if is_held(path, owner, age):
            raise ValueError(describe_owner(path, owner, age))
        seen = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        path.rename(seen)
    except FileNotFoundError:  # Its owner has just released it, or another start has replaced it.
        return
    except OSError as error:
        raise ValueError(f"run_dir: {path} cannot be read ({error.strerror}); remove it if no run uses it") from None
    if seen.read_bytes() != content:  # Another start was faster, and this is its lock.
        with contextlib.suppress(FileExistsError):
            os.link(seen, path)
    seen.unlink()


def read_owner(content: bytes) -> Owner | None:
    """Returns None for a file that its owner has not written yet, or not wholly."""
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
    except OSError:  # This is not Linux.
        return ""


def process_start(process: int) -> str | None:
    """Returns when a process of this host started, "" where the system does not say, or None where it has ended."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # A zombie has ended; its parent has not asked yet.
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""
