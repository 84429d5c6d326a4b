"""A recorded run, its training alone from the recording, and its rollouts alone: the same numbers, bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line
STEPS = 4


def records(run_dir: Path, *prefixes: str) -> list[dict[str, Any]]:
    """The records without times; with prefixes, only the metrics that begin with one of them."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {n: v for n, v in line.items() if not n.startswith("time/") and (not prefixes or n.startswith(prefixes))}
        for line in lines
    ]


@pytest.fixture(scope="module")
def settings(train_config: dict[str, Any]) -> dict[str, Any]:
    return train_config | {"num_steps": STEPS, "eval": train_config["eval"] | {"every": 2}}


@pytest.fixture(scope="module")
def whole(settings: dict[str, Any], command_line: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = command_line(
        "train", settings | {"run_dir": str(run_dir)}, run_dir.parent / "config.yaml", "rollout.record=true"
    )
    assert done.returncode == 0, done.stderr
    return run_dir


def test_training_alone(whole: Path, settings: dict[str, Any], command_line: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = settings | {"run_dir": str(run_dir)}
    done = command_line("train", config, tmp_path / "config.yaml", f"rollout.replay={whole}")
    assert done.returncode == 0, done.stderr
    assert records(run_dir) == records(whole) and len(records(run_dir)) == STEPS + 1
    for step in range(STEPS):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (run_dir / name).read_text() == (whole / name).read_text()
    mine, theirs = (load_file(folder / "hf" / "model.safetensors") for folder in (run_dir, whole))
    assert mine.keys() == theirs.keys() and all(mine[key].equal(theirs[key]) for key in mine)


@pytest.mark.slow
def test_training_alone_from_a_checkpoint(
    whole: Path, settings: dict[str, Any], command_line: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_000004")
    config = settings | {"run_dir": str(run_dir)}
    done = command_line("train", config, tmp_path / "config.yaml", f"rollout.replay={whole}")
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stderr
    assert records(run_dir) == records(whole)


@pytest.mark.slow
def test_rollouts_alone(whole: Path, settings: dict[str, Any], command_line: Run, tmp_path: Path) -> None:
    for first, start in ((0, None), (2, whole)):
        run_dir = tmp_path / f"run_{first}"
        if start is not None:
            shutil.copytree(start, run_dir)
            shutil.rmtree(run_dir / "checkpoints" / "step_000004")
        config = settings | {"run_dir": str(run_dir)}
        done = command_line("train", config, tmp_path / "config.yaml", "rollout.only=true")
        assert done.returncode == 0, done.stderr
        kinds = ("step", "reward/", "rollout/", "verifier/", "eval/")
        assert records(run_dir, *kinds)[first] == records(whole, *kinds)[first]
        name = f"rollouts/step_{first:06d}.jsonl"
        assert (run_dir / name).read_text() == (whole / name).read_text()
        assert not any(name.startswith(("policy/", "train/")) for name in records(run_dir)[first])
        assert not (run_dir / "checkpoints" / "step_000004").exists()


@pytest.mark.slow
def test_what_was_not_recorded_is_one_line(
    whole: Path, settings: dict[str, Any], command_line: Run, tmp_path: Path
) -> None:
    config = settings | {"run_dir": str(tmp_path / "run")}
    done = command_line("train", config, tmp_path / "config.yaml", f"rollout.replay={whole}", "seed=5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("Error: rollout.replay: ") and "another seed" in done.stderr
    config = settings | {"run_dir": str(tmp_path / "other")}
    done = command_line("train", config, tmp_path / "config.yaml", f"rollout.replay={tmp_path}")
    assert done.returncode == 2 and "holds no recording/" in done.stderr
