"""Whole runs on the local engine with over-sampling, killed in the middle of a rollout and resumed from the ledger."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal.rollout.ledger import read_records

Settings = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
GROUP_SIZE, NUM_PROMPTS = 4, 16  # prompts that a step asks for


@pytest.fixture(scope="module")
def config(train_config: Settings) -> Settings:
    """Two ranks decode waves of two groups each; a step needs 8 groups, and each group is of use."""
    return train_config | {
        "num_steps": 4,
        "parallel": {"tensor": 2},
        "algorithm": train_config["algorithm"] | {"selection": "all"},
        "data": train_config["data"] | {"prompts_per_step": NUM_PROMPTS // 2},
        "rollout": train_config["rollout"] | {"batch_size": 8, "oversampling": 2.0, "group_size": GROUP_SIZE},
        "checkpoint": train_config["checkpoint"] | {"every": 2},
        "eval": train_config["eval"] | {"every": 2},
    }


@pytest.fixture(scope="module")
def unbroken(config: Settings, command_line: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken-local")
    done = command_line("train", config | {"run_dir": str(folder / "run")}, folder / "config.yaml")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def records(run_dir: Path) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def samples(run_dir: Path, step: int) -> str:
    return (run_dir / "rollouts" / f"step_{step:06d}.jsonl").read_text()


def test_over_sampling_gives_up_waves(unbroken: Path) -> None:
    """A wave holds 4 groups: two waves are enough, and the other two are given up."""
    steps = records(unbroken)[:-1]
    assert len(steps) == 4 and all(record["rollout/staleness_max"] == 0 for record in steps)
    for step, record in enumerate(steps):
        assert len(samples(unbroken, step).splitlines()) == record["rollout/num_samples"] == GROUP_SIZE * 8
        assert record["rollout/num_given_up"] == GROUP_SIZE * 8 and record["rollout/num_tokens_given_up"] == 0


@pytest.mark.timeout(600)
def test_a_run_killed_in_a_rollout_generates_only_what_is_missing(
    config: Settings, unbroken: Path, command_line: Run, tmp_path: Path
) -> None:
    """Killed when the third step's ledger holds a first response; every number is that of the run that went on."""
    file = tmp_path / "config.yaml"
    settings = config | {"run_dir": str(tmp_path / "run")}
    file.write_text(yaml.safe_dump(settings))
    kept = tmp_path / "run" / "ledger" / "step_000003.bin"
    with subprocess.Popen([sys.executable, "-m", "megatron_oreal.cli", "train", str(file)]) as running:
        deadline = time.monotonic() + 300
        while not kept.exists() or kept.stat().st_size == 0:
            assert running.poll() is None and time.monotonic() < deadline, "no response was kept"
            time.sleep(0.001)
        os.kill(running.pid, signal.SIGKILL)
    time.sleep(1)  # the ranks end with their launcher
    num_kept = len(read_records(kept))
    done = command_line("train", settings, file)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stderr
    # Step 2 was whole, and step 3 had begun; a wave that is not whole is not used.
    found = {int(step): int(num) for step, num in re.findall(r"step (\d): (\d+) responses of the interr", done.stderr)}
    assert found[2] == len(samples(unbroken, 2).splitlines())
    whole = num_kept - num_kept % (4 * GROUP_SIZE)
    assert found.get(3, 0) == whole < NUM_PROMPTS * GROUP_SIZE
    for step in range(4):
        assert samples(tmp_path / "run", step) == samples(unbroken, step)
    assert records(tmp_path / "run") == records(unbroken)
