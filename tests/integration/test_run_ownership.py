"""A run owns its directory and its inputs, through the command line: one line and exit code 2 for everybody else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Settings = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line


def test_one_run_at_a_time(train_config: Settings, command_line: Run, tmp_path: Path) -> None:
    """The second one is refused while the first one runs; the lock of a killed run holds nobody back."""
    run_dir = tmp_path / "run"
    settings = train_config | {"run_dir": str(run_dir), "num_steps": 10_000}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_oreal.cli", "train", str(tmp_path / "first.yaml")]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for_record(run_dir / "metrics.jsonl", first)
        second = command_line("train", settings, tmp_path / "second.yaml")
        assert second.returncode == 2
        assert second.stderr.startswith(f"Error: run_dir: {run_dir} is in use by process {first.pid} on ")
        assert second.stderr.count("\n") == 1
        assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert (run_dir / "run.lock").is_file()
    steps = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")]
    done = command_line("train", settings | {"num_steps": max(steps, default=0) + 1}, tmp_path / "second.yaml")
    assert done.returncode == 0, done.stderr
    assert not (run_dir / "run.lock").exists()


def wait_for_record(file: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (file.is_file() and file.stat().st_size > 0):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.slow
def test_changed_prompts_changed_settings_and_fewer_steps(
    train_config: Settings, command_line: Run, tmp_path: Path
) -> None:
    run_dir, prompts = tmp_path / "run", tmp_path / "prompts.jsonl"
    shutil.copy(train_config["data"]["prompts"], prompts)
    settings = train_config | {"run_dir": str(run_dir), "num_steps": 4, "eval": {"num_samples": 0}}
    settings |= {"checkpoint": {"every": 2}, "data": train_config["data"] | {"prompts": str(prompts)}}
    assert command_line("train", settings, tmp_path / "config.yaml").returncode == 0
    files = contents(run_dir)
    assert {"inputs.json", "config.yaml"} <= {path.name for path in files} and run_dir / "run.lock" not in files

    done = command_line("train", settings, tmp_path / "config.yaml", "num_steps=2")
    assert done.returncode == 2 and done.stderr.startswith(f"Error: num_steps=2: {run_dir} already has a checkpoint")

    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    original = prompts.read_bytes()
    prompts.write_text("".join(json.dumps(row | {"answer": "999999"}) + "\n" for row in rows))
    done = command_line("train", settings, tmp_path / "config.yaml", "num_steps=5")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"Error: data.prompts: the prompts in {prompts} are not those that {run_dir} began w")
    assert contents(run_dir) == files

    moved = Path(shutil.copytree(run_dir, tmp_path / "moved"))
    prompts.unlink()
    (tmp_path / "renamed.jsonl").write_bytes(original)
    overrides = ["num_steps=5", f"run_dir={moved}", f"data.prompts={tmp_path}/renamed.jsonl"]
    overrides += ["parallel.microbatch_tokens=64", "model.recompute=full", "eval.every=7"]
    done = command_line("train", settings, tmp_path / "config.yaml", *overrides)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in (moved / "log.txt").read_text().splitlines() if "settings changed since" in line]
    assert "parallel.microbatch_tokens: 16384 -> 64" in line and "data.prompts: " in line
    assert "resumed at step 4 of 5" in done.stderr


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
