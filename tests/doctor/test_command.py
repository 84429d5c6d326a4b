"""The command: alone, on two ranks of torchrun, with mistakes, and with a check that never ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from megatron_oreal.commands.doctor import main
from megatron_oreal.doctor import examination
from megatron_oreal.doctor.collective import joined
from megatron_oreal.doctor.files import FileFacts
from megatron_oreal.launch import TORCH_RANKS
from tests.support.paths import ROOT
from tests.test_launch import write_run

COMMAND = ["-m", "megatron_oreal.cli", "doctor"]
TWO_RANKS = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *COMMAND]
CHECKS = [
    "packages", "gpus", "te", "fp8", "sglang", "interfaces", "host memory", "shared memory", "limits", "files",
    "all-reduce", "clocks",
]  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCH_RANKS, *(each for each in os.environ if each.startswith("SLURM"))):
        monkeypatch.delenv(name, raising=False)


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def process(command: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [sys.executable, *command, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, check=False
    )


def findings(report: dict[str, Any], check: str) -> list[dict[str, Any]]:
    return [finding for finding in report["findings"] if finding["check"] == check]


def test_a_machine_alone(tmp_path: Path) -> None:
    result = doctor("--folder", str(tmp_path), "--json")
    report = json.loads(result.stdout)
    assert list(dict.fromkeys(finding["check"] for finding in report["findings"])) == CHECKS
    assert {finding["status"] for finding in report["findings"]} <= {"ok", "warning", "error"}
    assert all(finding["fix"] for finding in report["findings"] if finding["status"] != "ok")
    assert result.exit_code == (1 if report["status"] == "error" else 0)
    assert report["num_ranks"] == 1
    assert "ran on one process" in findings(report, "all-reduce")[0]["message"]
    lines = doctor("--folder", str(tmp_path)).stdout.splitlines()
    assert len(lines) == len(CHECKS) + 1 and lines[-1].startswith("doctor: ")


def test_the_configuration_is_checked_too(tmp_path: Path) -> None:
    file = write_run(tmp_path, "run")
    report = json.loads(doctor(str(file), "--json").stdout)
    assert "rollout.engine=local needs no servers" in findings(report, "sglang")[0]["message"]
    assert [each["status"] for each in findings(report, "config")] == ["ok", "ok"]
    result = doctor(str(file), "data.examples=nothing.jsonl")
    assert (
        result.exit_code == 1 and "error   config        data.examples: nothing.jsonl cannot be read" in result.stdout
    )
    servers = ["rollout.engine=sglang", "rollout.sglang.python=nothing"]
    report = json.loads(doctor(str(file), *servers, "--json").stdout)
    assert findings(report, "sglang")[0]["status"] == "error" and findings(report, "ports")[0]["status"] == "ok"
    endpoints = "rollout.sglang.endpoints_file=nothing.json"
    report = json.loads(doctor(str(file), servers[0], endpoints, "--json").stdout)
    assert not findings(report, "sglang") and "cannot be read" in findings(report, "endpoints")[0]["message"]


def test_an_error_ends_with_1_and_a_warning_with_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "try_files", lambda _: FileFacts(tmp_path, bytes_per_second=1.0, free_bytes=2**40))
    result = doctor()
    assert result.exit_code == 0 and "warning files" in result.stdout
    monkeypatch.setattr(examination, "try_files", lambda _: FileFacts(tmp_path, problem="Read-only file system"))
    result = doctor()
    assert result.exit_code == 1 and "cannot be written (Read-only file system)" in result.stdout


def test_a_check_that_breaks_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Path) -> FileFacts:
        raise OSError("Stale file handle")

    monkeypatch.setattr(examination, "try_files", breaks)
    result = doctor()
    assert result.exit_code == 1 and "the check itself failed (OSError: Stale file handle)" in result.stdout
    assert "clocks" in result.stdout


def test_mistakes_end_with_2(tmp_path: Path) -> None:
    run = process(COMMAND, str(tmp_path / "nothing.yaml"))
    assert run.returncode == 2 and run.stderr == f"Error: {tmp_path}/nothing.yaml does not exist; " + (
        "give a YAML configuration file\n"
    )
    assert doctor("--seconds", "0").exit_code == 2
    assert doctor("--command", "serve").exit_code == 2


def test_a_check_without_end_is_named(tmp_path: Path) -> None:
    """A pipe that nobody writes to stands for a file server that does not answer."""
    file = write_run(tmp_path, "run")
    os.mkfifo(tmp_path / "pipe.jsonl")
    run = process(COMMAND, str(file), f"data.examples={tmp_path / 'pipe.jsonl'}", "--seconds", "6", "--json")
    assert run.returncode == 1, run.stderr
    last = json.loads(run.stdout)["findings"][-1]
    assert last["status"] == "error" and "no end after 6 s" in last["message"]


def test_ranks_that_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ValueError, match=r"rank 1 of 2 did not find the others at 127\.0\.0\.1 port 9 .*; open the"):
        with joined(1.0):
            pass


def test_two_ranks_sum_and_report_once(tmp_path: Path) -> None:
    run = process(TWO_RANKS, "--folder", str(tmp_path), "--json")
    [line] = run.stdout.splitlines()
    report = json.loads(line)
    assert report["num_ranks"] == 2 and len(report["hosts"]) == 1, run.stderr
    [found] = findings(report, "all-reduce")
    assert found["status"] == "ok" and found["message"].startswith("2 ranks, gloo, 4 MiB: ")
    assert [each["status"] for each in findings(report, "clocks")] == ["ok"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ranks_with_a_wrong_interface(tmp_path: Path) -> None:
    run = process(TWO_RANKS, "--folder", str(tmp_path), GLOO_SOCKET_IFNAME="nosuch0")
    assert run.returncode == 1
    assert "error   interfaces    GLOO_SOCKET_IFNAME=nosuch0 is no interface" in run.stdout
    assert "error   all-reduce    rank 0 of 2 did not find the others" in run.stdout
