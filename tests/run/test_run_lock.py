"""One run at a time in a run directory: who holds the lock is named, and a run that has ended holds nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_oreal.run.run_lock import LOCK, STALE_SECONDS, Owner, take_lock, this_process

HOLD = """
import sys
from pathlib import Path
from megatron_oreal.run.run_lock import take_lock
lock = take_lock(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def held_by(folder: Path, owner: Owner, age_seconds: float = 0.0) -> Path:
    path = folder / LOCK
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (path.stat().st_mtime - age_seconds,) * 2)
    return path


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()} on {re.escape(socket.gethostname())}"):
        take_lock(tmp_path)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    take_lock(tmp_path).release()


def test_another_process_holds_it_until_it_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
    with pytest.raises(ValueError, match=f"run_dir: {tmp_path} is in use by process {holder.pid} on .*; wait"):
        take_lock(tmp_path)
    # The lock of the file system tells too, where process ids say nothing, as between containers.
    held_by(tmp_path, replace(this_process(), process=2**22 + 1), age_seconds=STALE_SECONDS + 60)
    with pytest.raises(ValueError, match=f"is in use by process {2**22 + 1}"):
        take_lock(tmp_path)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    take_lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_id_that_was_given_out_again_holds_nothing(tmp_path: Path) -> None:
    held_by(tmp_path, replace(this_process(), started="1"))
    take_lock(tmp_path).release()


def test_the_lock_of_another_host_counts_while_it_shows_life(tmp_path: Path) -> None:
    elsewhere = Owner("node7", "another boot", 4711, "1", "2026-11-27 08:00:00")
    path = held_by(tmp_path, elsewhere, age_seconds=STALE_SECONDS - 60)
    with pytest.raises(ValueError, match=r"process 4711 on node7 since 2026-11-27 08:00:00; .*sign of life 24\d s ago"):
        take_lock(tmp_path)
    assert json.loads(path.read_text())["host"] == "node7"
    held_by(tmp_path, elsewhere, age_seconds=STALE_SECONDS + 60)
    take_lock(tmp_path).release()
    # Two hosts of one name are told apart by their boots.
    held_by(tmp_path, replace(this_process(), boot="another boot", process=2**22 + 1))
    with pytest.raises(ValueError, match="is in use by process"):
        take_lock(tmp_path)


def test_a_lock_that_is_not_written_yet_counts(tmp_path: Path) -> None:
    path = tmp_path / LOCK
    path.write_text("")
    with pytest.raises(ValueError, match="is in use by another process"):
        take_lock(tmp_path)
    os.utime(path, (0, 0))
    take_lock(tmp_path).release()


def test_the_lock_of_a_later_run_is_not_removed(tmp_path: Path) -> None:
    lock = take_lock(tmp_path)
    path = held_by(tmp_path, Owner("node7", "another boot", 4711, "1", "2026-11-27 08:00:00"))
    lock.release()
    assert path.is_file()
