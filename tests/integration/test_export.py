"""Checkpoints of a run by name: `megatron-oreal export`, and `eval --run`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_oreal.conversion.run_checkpoints import find_checkpoint

Settings = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
METRIC = "eval/heldout/greedy"


def megatron_oreal(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_oreal.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def trained(sft_config: Settings, command_line: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    checkpoint = {"every": 2, "keep_last": 3, "best_metric": METRIC}
    settings = sft_config | {"run_dir": str(run_dir), "checkpoint": checkpoint}
    settings["eval"] = settings["eval"] | {"every": 2}
    done = command_line("sft", settings, run_dir.parent / "sft.yaml")
    assert done.returncode == 0, done.stderr
    return run_dir


def write_run(folder: Path, scores: dict[int, float | None], best_metric: str = METRIC) -> Path:
    """Makes a run_dir whose checkpoints hold nothing but their evaluations."""
    for step, score in scores.items():
        checkpoint = folder / "checkpoints" / f"step_{step:06d}"
        checkpoint.mkdir(parents=True)
        evaluation = {} if score is None else {METRIC: score, "eval/heldout/length": 3.0}
        (checkpoint / "run.json").write_text(json.dumps({"progress": {"evaluation": evaluation}}))
    config = {"model": {"path": "model"}, "checkpoint": {"best_metric": best_metric}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_last_checkpoint_is_what_the_run_exports(trained: Path) -> None:
    done = megatron_oreal("export", str(trained), "last")
    out = trained / "exports" / "step_000006"
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{out}: the policy of step 6 (the last one)"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, trained / "hf"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    names = [{file.name for file in folder.iterdir()} for folder in (out, trained / "hf")]
    assert names[0] == names[1]


def test_a_checkpoint_is_evaluated_by_name(trained: Path, task: Path, tmp_path: Path) -> None:
    settings = {
        "run_dir": str(tmp_path / "eval"),
        "model": {"path": "given by --run"},
        "data": {"format": "plain", "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "eval": {"prompts": {"heldout": str(task / "heldout.jsonl")}, "num_samples": 1},
    }
    config = tmp_path / "eval.yaml"
    config.write_text(yaml.safe_dump(settings))
    done = megatron_oreal("eval", str(config), "--run", str(trained), "--checkpoint", "best")
    assert done.returncode == 0, done.stderr
    best = find_checkpoint(trained, "best")
    assert f"{best.export}: the policy of step {best.step} ({METRIC}" in done.stderr
    resolved = yaml.safe_load((tmp_path / "eval" / "config.yaml").read_text())
    assert resolved["model"]["path"] == str(best.export)


def test_best_is_the_first_of_the_highest(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, {2: 0.25, 4: 0.75, 6: 0.75, 8: None})
    found = find_checkpoint(run_dir, "best")
    assert (found.step, found.words) == (4, f"{METRIC} 0.75, the best of 3 that were evaluated")
    assert find_checkpoint(run_dir, "last").step == 8
    assert find_checkpoint(run_dir, "6").step == find_checkpoint(run_dir, "step_000006").step == 6


def test_the_only_greedy_score_decides_where_the_run_names_none(tmp_path: Path) -> None:
    assert find_checkpoint(write_run(tmp_path, {1: 0.5, 2: 0.25}, best_metric=""), "best").step == 1


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        ("5", "", r"there is no step 5; the checkpoints of .* are those of the steps 2, 4"),
        ("bset", "", r"must be best, last or the number of a step, got 'bset'"),
        ("best", "eval/x", r"no checkpoint has 'eval/x'; measured: eval/heldout/greedy, eval/heldout/length"),
        ("last", METRIC, r"--metric chooses the best checkpoint: drop it"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_those_that_are(
    tmp_path: Path, name: str, metric: str, message: str
) -> None:
    run_dir = write_run(tmp_path, {2: 0.5, 4: 0.5})
    with pytest.raises(ValueError, match=message):
        find_checkpoint(run_dir, name, metric)


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; give the run_dir"):
        find_checkpoint(tmp_path / "nothing", "last")
    with pytest.raises(ValueError, match="is no run_dir of train or sft"):
        find_checkpoint(tmp_path, "last")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        find_checkpoint(tmp_path, "last")


def test_without_any_evaluation_best_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint was evaluated"):
        find_checkpoint(write_run(tmp_path, {2: None}, best_metric=""), "best")


@pytest.mark.parametrize("command", ["inspect", "mcore2hf"])
def test_convert_names_the_model_of_a_checkpoint(trained: Path, tmp_path: Path, command: str) -> None:
    step = trained / "checkpoints" / "step_000006"
    for path, hint in ((step, f"give one of its models: {step / 'policy'}"), (trained, f"export {trained} best`")):
        arguments = [str(path)] if command == "inspect" else ["--mcore", str(path), "--out", str(tmp_path / "out")]
        done = megatron_oreal("convert", command, *arguments)
        assert done.returncode == 2 and hint in done.stderr and len(done.stderr.splitlines()) == 1
