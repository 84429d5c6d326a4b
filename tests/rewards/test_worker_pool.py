from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_oreal.rewards.process_pool import JOBS_PER_PROCESS
from megatron_oreal.rewards.worker_pool import Comparison, WorkerPool, WorkerProcess
from tests.support.hostile_answers import ENDLESS as ENDLESS_PREDICTION
from tests.support.hostile_answers import ENDLESS_ANSWER, SLOW_REFERENCE
from tests.support.paths import ROOT

EASY = Comparison("2k+2", "2(k+1)")
WRONG = Comparison("2k+2", "2(k+2)")
ENDLESS = Comparison(ENDLESS_ANSWER, ENDLESS_PREDICTION)
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
    assert worker.compare(EASY) == "timeout"  # which says nothing about the reference
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
        assert b"HOME=/nonexistent" in environment
        assert "libtorch" not in (proc / "maps").read_text()


def test_a_slow_reference_costs_one_worker_once() -> None:
    pool = WorkerPool(num_workers=2, cpu_seconds=0.3)
    try:
        pool.compare_many([EASY, WRONG])
        first = {worker.process.pid for worker in pool.workers.values()}
        comparisons = [Comparison(SLOW_REFERENCE, f"x+{number}") for number in range(20)]
        assert pool.compare_many(comparisons) == ["slow_reference"] * 20
        assert pool.compare_many([EASY, WRONG] * 3) == ["equal", "different"] * 3
        assert len(first - {worker.process.pid for worker in pool.workers.values()}) <= 1
    finally:
        pool.close()


def test_a_comparison_that_fails_is_a_crash_and_the_process_goes_on(pool: WorkerPool) -> None:
    """The worker meets its memory limit as an error, not as an end."""
    pool.memory_bytes = 400 * 2**20
    broken = Comparison("x+1", None)  # type: ignore[arg-type]
    assert pool.compare_many([EASY, broken, EASY]) == ["equal", "crash", "equal"]
    assert pool.workers[0].num_jobs == 3


def limits_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:47].strip() for line in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_is_confined(pool: WorkerPool) -> None:
    pool.memory_bytes = 2**30
    pool.compare_many([EASY])
    pid = pool.workers[0].process.pid
    limits = limits_of(pid)
    assert limits["Max address space"] == str(2**30)
    assert limits["Max file size"] == limits["Max core file size"] == limits["Max processes"] == "0"
    assert int(limits["Max open files"]) <= 64
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )
    assert status["NoNewPrivs"] == "1"


REACH = """
import importlib.util, json, os, socket, subprocess, sys
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
sys.path.insert(0, "")  # the script takes its own folder away
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker.confine(os.getppid(), 2**31, worker.needed_files())
done = []
def attempt(name, action):
    try:
        action()
        done.append(name)
    except OSError:
        pass
attempt("secret", lambda: open(sys.argv[2]).read())
attempt("write", lambda: open(sys.argv[2] + ".new", "w").write("x"))
attempt("checkout", lambda: open(sys.argv[3]).read())
attempt("network", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[4])), timeout=2))
attempt("package", lambda: open(sys.argv[1]).read())
print(json.dumps(done))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux confines the worker")
def test_a_worker_reaches_no_secret_and_no_network(tmp_path: Path) -> None:
    """What the kernel refuses depends on it: Landlock since 5.13, namespaces where they are allowed."""
    secret = tmp_path / "servers.json"
    secret.write_text("key")
    script = ROOT / "megatron_oreal" / "rewards" / "worker.py"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = str(listening.getsockname()[1])
        command = [sys.executable, "-c", REACH, str(script), str(secret), str(ROOT / "README.md"), port]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        [reached] = [json.loads(line) for line in done.stdout.splitlines()]
    assert "package" in reached and "write" not in reached
    system = ctypes.CDLL(None)
    if system.syscall(444, None, 0, 1) >= 1:  # Landlock's version
        assert "secret" not in reached and "checkout" not in reached
    if subprocess.run(["unshare", "--user", "--net", "true"], check=False, capture_output=True).returncode == 0:
        assert "network" not in reached


def test_defaults_are_generous_and_a_process_is_replaced_after_its_jobs(pool: WorkerPool) -> None:
    assert WorkerPool().wall_seconds == 30.0 + 30.0 * 3.0
    assert WorkerPool(wall_seconds=7.0).wall_seconds == 7.0
    pool.compare_many([EASY])
    first = pool.workers[0]
    first.num_jobs = JOBS_PER_PROCESS
    assert pool.compare_many([WRONG]) == ["different"]
    assert pool.workers[0] is not first
    assert not first.is_running


OWNER = """
import sys, threading, time
from megatron_oreal.rewards.worker_pool import Comparison, WorkerPool
from tests.support.hostile_answers import ENDLESS, ENDLESS_ANSWER

if __name__ != "__main__":
    raise SystemExit("the worker ran the main script again")
pool = WorkerPool(num_workers=1, cpu_seconds=100.0)
pool.compare_many([Comparison("2k+2", "2(k+1)")])
threading.Thread(target=pool.compare_many, args=([Comparison(ENDLESS_ANSWER, ENDLESS)],), daemon=True).start()
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
