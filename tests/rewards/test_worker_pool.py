from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_oreal.rewards.worker_pool import Comparison, WorkerPool, WorkerProcess
from tests.support.paths import ROOT

EASY = Comparison("2k+2", "2(k+1)")
WRONG = Comparison("2k+2", "2(k+2)")
ENDLESS = Comparison("x+1", "(x+y+z+w)^{999}")
MEMORY_BYTES = 2 * 2**30


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool(num_workers=1, cpu_seconds=0.5)
    yield pool
    pool.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose new parent has not waited yet is as good as gone.
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_comparison_beyond_its_cpu_budget_times_out_and_the_pool_goes_on(pool: WorkerPool) -> None:
    assert pool.compare_many([EASY, ENDLESS, WRONG, ENDLESS, EASY]) == [
        "equal",
        "timeout",
        "different",
        "timeout",
        "equal",
    ]


def test_a_worker_that_hangs_without_computing_meets_the_wall_limit() -> None:
    worker = WorkerProcess(cpu_seconds=5.0, wall_seconds=0.5, memory_bytes=MEMORY_BYTES)
    os.kill(worker.process.pid, signal.SIGSTOP)
    assert worker.compare(EASY) == "timeout"
    assert not worker.is_running


def test_a_worker_that_dies_in_a_comparison_is_a_crash() -> None:
    worker = WorkerProcess(cpu_seconds=5.0, wall_seconds=60.0, memory_bytes=MEMORY_BYTES)
    os.kill(worker.process.pid, signal.SIGSTOP)  # the comparison cannot finish before the kill
    threading.Timer(0.3, worker.process.kill).start()
    assert worker.compare(EASY) == "crash"
    assert not worker.is_running


def test_a_comparison_whose_worker_was_killed_is_repeated(pool: WorkerPool) -> None:
    assert pool.compare_many([EASY]) == ["equal"]
    first = pool.workers[0].process
    first.kill()  # while idle
    assert pool.compare_many([EASY]) == ["equal"]
    second = pool.workers[0].process
    assert second.pid != first.pid
    os.kill(second.pid, signal.SIGSTOP)
    threading.Timer(0.3, second.kill).start()  # in the middle
    assert pool.compare_many([WRONG]) == ["different"]
    assert pool.workers[0].process.pid != second.pid


def test_no_process_is_started_before_it_is_needed_and_none_is_left(pool: WorkerPool) -> None:
    assert pool.workers == {}
    pool.compare_many([EASY])
    pid = pool.workers[0].process.pid
    assert is_alive(pid)
    pool.close()
    assert not is_alive(pid)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.compare_many([EASY])


def test_close_does_not_wait_for_a_long_comparison() -> None:
    pool = WorkerPool(num_workers=1, cpu_seconds=60.0)
    pool.compare_many([EASY])
    errors: list[BaseException] = []

    def compare() -> None:
        try:
            pool.compare_many([ENDLESS] * 5)
        except RuntimeError as error:
            errors.append(error)

    caller = threading.Thread(target=compare)
    caller.start()
    time.sleep(0.3)
    started = time.monotonic()
    pool.close()
    caller.join(timeout=20)
    assert time.monotonic() - started < 10
    assert len(errors) == 1


def test_the_launchers_environment_stays_outside(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert pool.compare_many([EASY]) == ["equal"]
    proc = Path(f"/proc/{pool.workers[0].process.pid}")
    if proc.exists():
        environment = (proc / "environ").read_bytes().split(b"\0")
        assert b"PYTHONHASHSEED=0" in environment
        assert not any(variable.startswith((b"RANK=", b"MASTER_PORT=")) for variable in environment)
        assert "libtorch" not in (proc / "maps").read_text()


OWNER = """
import sys, threading, time
from megatron_oreal.rewards.worker_pool import Comparison, WorkerPool

if __name__ != "__main__":
    raise SystemExit("the worker ran the main script again")
pool = WorkerPool(num_workers=1, cpu_seconds=100.0)
pool.compare_many([Comparison("2k+2", "2(k+1)")])
threading.Thread(target=pool.compare_many, args=([Comparison("x+1", "(x+y+z+w)^{999}")],), daemon=True).start()
time.sleep(0.3)
print(pool.workers[0].process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the workers on Linux only")
def test_a_busy_worker_does_not_outlive_its_owner(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert is_alive(pid)
        owner.kill()
    wait_until_gone(pid)


@pytest.mark.parametrize(("name", "value"), [("num_workers", 0), ("cpu_seconds", 0.0)])
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"verifier.{name}"):
        WorkerPool(**{name: value})  # type: ignore[arg-type]
