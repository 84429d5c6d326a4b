"""Whole runs whose samples come from real SGLang servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal.engines.sglang.endpoints import read_endpoints
from megatron_oreal.engines.sglang.servers.launcher import descendants
from tests.support import paths

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(900)]
SGLANG_PYTHON = str(paths.SGLANG_PYTHON)
SECONDS = 600
Run = Callable[..., subprocess.CompletedProcess[str]]
Settings = dict[str, Any]


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def samples(run_dir: Path, step: int) -> list[dict[str, Any]]:
    file = run_dir / "rollouts" / f"step_{step:06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def with_servers(train_config: Settings, **rollout: Any) -> Settings:
    servers = {"python": SGLANG_PYTHON} | rollout.pop("sglang", {})
    return train_config | {
        "num_steps": 3,
        "rollout": train_config["rollout"] | {"engine": "sglang", "sglang": servers} | rollout,
        "eval": train_config["eval"] | {"every": 3},
    }


@pytest.fixture(scope="module")
def served(train_config: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A configuration whose two servers another process has started."""
    folder = tmp_path_factory.mktemp("served")
    config = folder / "serve.yaml"
    settings = with_servers(train_config, sglang={"num_servers": 2}) | {"run_dir": str(folder / "run")}
    config.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_oreal.cli", "serve", str(config)]
    endpoints = folder / "run" / "servers.json"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as serving:
        try:
            deadline = time.monotonic() + SECONDS
            while not endpoints.exists():
                assert serving.poll() is None, serving.stderr.read() if serving.stderr else ""
                assert time.monotonic() < deadline, "the server has not started"
                time.sleep(0.2)
            yield with_servers(train_config, sglang={"endpoints_file": str(endpoints)})
        finally:
            serving.send_signal(signal.SIGINT)
            serving.wait(120)


@pytest.fixture(scope="module")
def unbroken(served: Settings, command_line: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken-sglang")
    each_its_own = served["rollout"] | {"sglang": served["rollout"]["sglang"] | {"weight_senders": 2}}
    settings = served | {"run_dir": str(folder / "run"), "parallel": {"tensor": 2}, "rollout": each_its_own}
    done = command_line("train", settings, folder / "config.yaml", timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_servers_sample_from_the_policy_of_each_step(unbroken: Path) -> None:
    """The trainer has two tensor-parallel ranks, and either sends the weights to one of the servers; each step's
    samples have the log-probs of its own policy."""
    steps = records(unbroken)[:-1]
    assert [record["rollout/staleness_max"] for record in steps] == [0, 0, 0]
    assert any("policy/mismatch_max" in record for record in steps[1:])
    for record in steps:
        assert record.get("policy/mismatch_max", 0.0) < 1e-4
        assert record["rollout/num_requests"] >= 20 and record["rollout/num_retries"] == 0
    assert [{row["policy_version"] for row in samples(unbroken, step)} for step in range(3)] == [{0}, {1}, {2}]
    assert (unbroken / "hf" / "model.safetensors").is_file()


def test_a_run_killed_in_a_rollout_generates_only_what_is_missing(
    served: Settings, unbroken: Path, command_line: Run, tmp_path: Path
) -> None:
    """The servers answer so slowly, one request at a time, that some responses are there and others are not."""
    slow = served["rollout"] | {"sglang": served["rollout"]["sglang"] | {"max_concurrent_requests": 1}}
    settings = served | {"run_dir": str(tmp_path / "run"), "parallel": {"tensor": 2}, "rollout": slow}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    ledger = tmp_path / "run" / "ledger"
    with subprocess.Popen([sys.executable, "-m", "megatron_oreal.cli", "train", str(config)]) as running:
        deadline = time.monotonic() + SECONDS
        while not any(file.stat().st_size > 600 for file in ledger.glob("step_*.bin")):
            assert running.poll() is None and time.monotonic() < deadline, "no response was kept"
            time.sleep(0.002)
        os.kill(running.pid, signal.SIGKILL)
    done = command_line("train", settings, config, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    assert "of the interrupted run were in the ledger" in done.stderr
    for step in range(3):
        ours, theirs = samples(tmp_path / "run", step), samples(unbroken, step)
        assert [row["response"] for row in ours] == [row["response"] for row in theirs]
    assert [r["reward/mean"] for r in records(tmp_path / "run")[:-1]] == [
        r["reward/mean"] for r in records(unbroken)[:-1]
    ]


def test_rollouts_run_ahead_and_are_corrected(served: Settings, command_line: Run, tmp_path: Path) -> None:
    rollout = served["rollout"] | {"staleness": 1}
    algorithm = served["algorithm"] | {"policy_freeze_steps": 0}
    settings = served | {"run_dir": str(tmp_path / "run"), "rollout": rollout, "algorithm": algorithm, "num_steps": 4}
    settings["alarms"] = {"mismatch": 1e-9}
    done = command_line("train", settings, tmp_path / "config.yaml", timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "run")[:-1]
    assert [record["rollout/staleness_max"] for record in steps] == [0, 1, 1, 1]
    trained = [record for record in steps if not record["train/skipped"]]
    assert trained and all(0 < record["policy/importance_mean"] <= 2 for record in trained)
    assert "alarms.mismatch allows 1e-09" in done.stderr


def test_over_sampling_gives_up_the_slowest_and_resumes_them(
    served: Settings, command_line: Run, tmp_path: Path
) -> None:
    servers = served["rollout"]["sglang"] | {"max_concurrent_requests": 4}
    rollout = served["rollout"] | {"oversampling": 2.0, "unfinished": "resume", "sglang": servers}
    algorithm = served["algorithm"] | {"selection": "all"}  # every complete group is of use
    settings = served | {"run_dir": str(tmp_path / "run"), "rollout": rollout, "algorithm": algorithm, "num_steps": 4}
    done = command_line("train", settings, tmp_path / "config.yaml", timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    steps = records(tmp_path / "run")[:-1]
    assert sum(record["rollout/num_given_up"] for record in steps) > 0
    assert sum(record["rollout/num_carried"] + record["rollout/num_resumed"] for record in steps[1:]) > 0
    for step, record in enumerate(steps):
        assert record["rollout/staleness_max"] <= 1, step


def test_colocated_servers_of_the_run_itself(
    train_config: Settings, unbroken: Path, command_line: Run, tmp_path: Path
) -> None:
    """Weights go through the disk, requests through the router; models leave their device for each rollout and
    checkpoint: the numbers stay."""
    servers = {"placement": "colocated", "weight_transport": "disk", "check_weights": True, "router": True}
    settings = with_servers(train_config, sglang=servers) | {"run_dir": str(tmp_path / "run"), "num_steps": 2}
    settings["parallel"] = {"tensor": 2}
    settings["checkpoint"] = settings["checkpoint"] | {"every": 1}
    done = command_line("train", settings, tmp_path / "config.yaml", timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(records(tmp_path / "run")[:2], records(unbroken)[:2], strict=True):
        for name in ("policy/loss", "policy/grad_norm", "reward_model/loss", "reward/mean"):
            assert (name in ours) == (name in theirs)
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-4)


@contextmanager
def two_nodes(config: Path, folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """A trainer's two processes, each on a node of its own as far as it knows. Output goes to FOLDER/rank<n>.txt."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = []
    try:
        for rank in range(2):
            variables = common | {"RANK": rank, "GROUP_RANK": rank, "OMP_NUM_THREADS": 1}
            environment = os.environ | {name: str(value) for name, value in variables.items()}
            # Not into a pipe: torch's manager of shared memory keeps it open as long as the server lives.
            with (folder / f"rank{rank}.txt").open("wb") as output:
                command = [sys.executable, "-m", "megatron_oreal.cli", "train", str(config)]
                running.append(subprocess.Popen(command, stdout=output, stderr=output, env=environment))
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def servers_of(trainer: subprocess.Popen[bytes]) -> list[int]:
    """Supervisor and server of one process, as soon as they are there; and its other children."""
    deadline = time.monotonic() + SECONDS
    while sum(is_server(process) for process in descendants(trainer.pid)) < 2:
        assert trainer.poll() is None and time.monotonic() < deadline, "no server was started"
        time.sleep(0.1)
    return descendants(trainer.pid)


def is_server(process: int) -> bool:
    try:
        return "servers/launcher.py" in Path(f"/proc/{process}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(processes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, "a server outlives its trainer"
        time.sleep(0.1)


def colocated_on_two_nodes(train_config: Settings, folder: Path) -> Path:
    """The configuration's file."""
    servers = {"placement": "colocated", "weight_transport": "tensor", "check_weights": True}
    settings = with_servers(train_config, sglang=servers)
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"run_dir": str(folder / "run"), "parallel": {"tensor": 2}}))
    return config


def test_colocated_servers_of_two_nodes(train_config: Settings, unbroken: Path, tmp_path: Path) -> None:
    """Both nodes' servers generate and get all weights, and end with the run."""
    run_dir = tmp_path / "run"
    with two_nodes(colocated_on_two_nodes(train_config, tmp_path), tmp_path) as trainers:
        started = [process for trainer in trainers for process in servers_of(trainer)]
        while not (run_dir / "servers.json").exists() and trainers[0].poll() is None:
            time.sleep(0.05)
        assert len(read_endpoints(run_dir / "servers.json")) == 2, (tmp_path / "rank0.txt").read_text()
        assert [trainer.wait(SECONDS) for trainer in trainers] == [0, 0], (tmp_path / "rank0.txt").read_text()
    assert not any(map(is_alive, started)) and not (run_dir / "servers.json").exists()
    for server in range(2):
        log = (run_dir / "servers" / f"server_{server}.log").read_text()
        assert log.count('"POST /generate HTTP/1.1" 200') >= 10
        assert log.count('"POST /end_weight_update HTTP/1.1" 200') == 4  # versions 0 to 3
        assert log.count('"POST /weights_checker HTTP/1.1" 200') == 4
    for ours, theirs in zip(records(run_dir)[:3], records(unbroken)[:3], strict=True):
        for name in ("policy/loss", "policy/grad_norm", "reward_model/loss", "reward/mean"):
            assert (name in ours) == (name in theirs)
            assert ours.get(name, 0.0) == pytest.approx(theirs.get(name, 0.0), rel=1e-4)


def test_a_nodes_server_ends_with_its_own_trainer(train_config: Settings, tmp_path: Path) -> None:
    with two_nodes(colocated_on_two_nodes(train_config, tmp_path), tmp_path) as trainers:
        first, second = map(servers_of, trainers)
        trainers[1].kill()
        wait_until_gone(second)
        assert sum(map(is_server, first)) >= 2
        trainers[0].kill()
        wait_until_gone(first)
