"""The watchdog: deadlines, what it says of a hang, and how it ends a process that sleeps."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_oreal.config import WatchdogConfig
from megatron_oreal.observability.hang_channel import Hang, HangChannel
from megatron_oreal.observability.metrics import PhaseTimer
from megatron_oreal.observability.stacks import RankState, stacks_of_process, state_of_process, within
from megatron_oreal.observability.stacks import write_where_possible as write
from megatron_oreal.observability.watchdog import Deadlines, Watchdog, describe_hang

HANG = Hang("step_000003_update_20260101T000000Z", 1, "update", 3, 61.2, 60.0)
WAITS = RankState(0, "node1", "update", 3, 61.0, "train_step (trainable.py:9)", True, (), ())
SLEEPS = RankState(1, "node2", "update", 3, 61.0, "oversleep (rewards.py:7)", False, (), ())


def test_deadlines_grow_with_what_a_phase_has_taken() -> None:
    deadlines = Deadlines(WatchdogConfig(factor=10, update_seconds=100, rollout_seconds=None))
    assert deadlines.of("update") == 100 and deadlines.of("rollout") is None
    deadlines.ended("update", 9.0)
    assert deadlines.of("update") == 100
    deadlines.ended("update", 20.0)
    deadlines.ended("update", 1.0)
    assert deadlines.of("update") == 200 and deadlines.of("weight_sync") == 1500
    assert Deadlines(WatchdogConfig(enabled=False)).of("update") is None


def test_every_phase_of_the_timer_has_a_deadline() -> None:
    phases: list[str] = []
    timer = PhaseTimer(on_phase=phases.append)
    with timer("update"):
        pass
    with pytest.raises(OSError), timer("rollout"):
        raise OSError
    assert phases == ["update", "other", "rollout", "other"]
    known = WatchdogConfig().least_seconds()
    assert {"start", "rollout", "update", "weight_sync", "evaluation", "checkpoint", "other", "end"} == set(known)
    collective = ("update", "weight_sync", "checkpoint", "other")
    assert all(known[phase] < 1800 for phase in collective), "parallel.timeout_seconds would end the run first"


def test_the_rank_that_does_not_wait_is_to_blame() -> None:
    told = describe_hang(HANG, {0: WAITS, 1: SLEEPS}, 2)
    assert told == (
        "update of step 3 has taken 61.2 s on rank 1, more than its deadline of 60 s; "
        "rank 1 on node2 is in oversleep (rewards.py:7)"
    )


def test_a_rank_in_another_phase_and_its_threads_are_named() -> None:
    first = replace(WAITS, waits=False, phase="rollout", step=4, threads=("verifier-0 in serve (process_pool.py:9)",))
    told = describe_hang(HANG, {0: first, 1: replace(SLEEPS, waits=True)}, 2)
    assert told.endswith(
        "; rank 0 on node1 is in train_step (trainable.py:9) (rollout of step 4), thread verifier-0 in serve "
        "(process_pool.py:9)"
    )


def test_ranks_that_wait_for_each_other_and_silent_ranks_are_told_apart() -> None:
    waiting = {rank: replace(WAITS, rank=rank) for rank in range(8)}
    told = describe_hang(HANG, waiting, 8)
    assert "all ranks wait for each other or for their GPUs; rank 0 on node1" in told and "rank 3" not in told
    assert describe_hang(HANG, {0: WAITS}, 2).endswith("; rank 1 gave no sign of life")
    assert describe_hang(HANG, {0: WAITS}, 8).endswith("; ranks 1, 2, 3, ... gave no sign of life")


def test_servers_without_an_answer_are_named() -> None:
    asked = replace(SLEEPS, rank=0, requests=("SGLang server http://a has not answered 3 requests",))
    assert describe_hang(HANG, {0: asked}, 1).endswith("; SGLang server http://a has not answered 3 requests")


def test_the_ranks_exchange_states_without_a_collective(tmp_path: Path) -> None:
    channels = [HangChannel(dist.FileStore(str(tmp_path / "store"), 2), rank, 2) for rank in range(2)]
    assert channels[1].found() is None and not channels[1].is_over(0.0)
    other = replace(HANG, rank=0)
    assert channels[1].tell(HANG) == HANG and channels[0].tell(other) == HANG, "the first one counts"
    assert channels[0].found() == HANG
    asked = replace(SLEEPS, threads=("production in generate (engine.py:1)",), requests=("a", "b"))
    channels[1].publish(asked)
    assert channels[0].gather(WAITS, 5.0) == {0: WAITS, 1: asked}
    channels[0].finish()
    assert channels[1].is_over(5.0)
    assert channels[1].gather(asked, 0.0) == {1: asked}, "rank 0 has told nothing"


def test_one_rank_needs_no_store() -> None:
    channel = HangChannel(None, 0, 1)
    assert channel.found() is None and channel.tell(HANG) == HANG
    channel.publish(WAITS)
    assert channel.gather(WAITS, 0.0) == {0: WAITS}


def test_a_store_that_is_gone_is_one_without_news() -> None:
    server = dist.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, 1, False)
    channel = HangChannel(client, 1, 2)
    del server
    assert channel.found() is None
    assert channel.tell(HANG) == HANG
    channel.publish(SLEEPS)
    assert channel.gather(SLEEPS, 0.0) == {1: SLEEPS}


def test_stacks_name_the_threads() -> None:
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, name="the sleeper")
    thread.start()
    stacks = stacks_of_process()
    may_end.set()
    thread.join()
    assert f"Thread 0x{thread.ident:016x} is the sleeper" in stacks and "in test_stacks_name_the_threads" in stacks
    state = state_of_process(0, "update", 2, 1.0, ("a",))
    assert (state.phase, state.step, state.requests, state.waits) == ("update", 2, ("a",), False)
    assert "state_of_process (stacks.py:" in state.place


def test_a_file_system_that_hangs_does_not_hang_the_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    os.mkfifo(tmp_path / "pipe")  # to open it for writing waits for a reader
    written = write(tmp_path, "pipe", "the stacks", 0.1)
    assert written.parent == tmp_path / "temporary" and written.read_text() == "the stacks"
    assert write(tmp_path / "new", "file", "x", 5.0) == tmp_path / "new" / "file"
    blocked = threading.Event()
    assert not within(0.0, lambda: blocked.wait(5)) and within(5.0, lambda: None)
    blocked.set()


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    config = WatchdogConfig(start_seconds=0.5, update_seconds=0.5, other_seconds=0.5)
    with Watchdog(config, tmp_path, HangChannel(None, 0, 1)) as watchdog:
        for _ in range(20):
            watchdog.enter("update")
            time.sleep(0.05)
            watchdog.enter("other")
    assert watchdog.is_closed.is_set() and not list(tmp_path.iterdir())


SLEEPER = """
import sys, time
from pathlib import Path
from megatron_oreal.config import WatchdogConfig
from megatron_oreal.observability.hang_channel import HangChannel
from megatron_oreal.observability.watchdog import Watchdog

def oversleep():
    time.sleep(100)

config = WatchdogConfig(start_seconds=60, update_seconds=0.2)
watchdog = Watchdog(config, Path(sys.argv[1]), HangChannel(None, 0, 1))
watchdog.server_states = lambda: (["the server is silent"], ["    POST /generate abc: no answer for 9.0 s"])
watchdog.at_end.append(Path(sys.argv[1], "lock").unlink)
watchdog.step = 7
watchdog.enter("update")
oversleep()
"""


@pytest.fixture
def sleeper(tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    def run() -> subprocess.CompletedProcess[str]:
        (tmp_path / "lock").touch()
        command = [sys.executable, "-c", SLEEPER, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    return run


def test_a_process_that_sleeps_is_ended_with_its_stacks(
    sleeper: Callable[[], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = sleeper()
    assert done.returncode == 75, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: hang: update of step 7 has taken 0.")
    assert " s on rank 0, more than its deadline of 0.2 s; rank 0 on " in line
    assert "is in oversleep (<string>:" in line and "; the server is silent; the stacks of all ranks are in" in line
    assert line.endswith("; the same command continues from the last checkpoint")
    (folder,) = (tmp_path / "hangs").iterdir()
    assert str(folder) in line and folder.name.startswith("step_000007_update_")
    assert (folder / "hang.txt").read_text() == f"{line}\n" and line in (tmp_path / "log.txt").read_text()
    stacks = (folder / "rank_00000.txt").read_text()
    assert "is MainThread" in stacks and "in oversleep" in stacks and "POST /generate abc" in stacks
    assert not (tmp_path / "lock").exists(), "the next start may run on another host"


def test_a_hang_that_comes_back_leaves_the_queue(
    sleeper: Callable[[], subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    for number in range(2):
        (tmp_path / "hangs" / f"step_000007_rollout_{number}").mkdir(parents=True)
    (tmp_path / "hangs" / "step_000006_rollout_9").mkdir()
    done = sleeper()
    assert done.returncode == 1
    assert done.stderr.endswith("; it is hang 3 of this step, so the run is not put back into the queue\n")
