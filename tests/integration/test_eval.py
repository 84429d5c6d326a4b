"""`megatron-oreal eval` and `compare`: what they print and leave, resuming, and layouts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.rewards.answer import answer_key

Settings = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line


@pytest.fixture(scope="module")
def eval_config(task: Path, warm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two datasets: the held-out prompts, and the last ten of the training prompts."""
    lines = (task / "train.jsonl").read_text().splitlines(keepends=True)
    others = tmp_path_factory.mktemp("others") / "others.jsonl"
    others.write_text("".join(lines[-10:]))
    return {
        "model": {"path": str(warm_model)},
        "data": {"format": "plain", "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "eval": {
            "prompts": {"heldout": str(task / "heldout.jsonl"), "others": str(others)},
            "num_samples": 6,
            "prompts_per_batch": 4,
        },
    }


@pytest.fixture(scope="module")
def finished(
    eval_config: Settings, command_line: Run, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = command_line("eval", eval_config | {"run_dir": str(run_dir)}, run_dir.parent / "eval.yaml")
    assert done.returncode == 0, done.stderr
    return run_dir, done


def questions(run_dir: Path, dataset: str) -> list[Settings]:
    return [json.loads(line) for line in (run_dir / "questions" / f"{dataset}.jsonl").read_text().splitlines()]


def test_every_answer_and_every_metric_is_left(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, done = finished
    results = json.loads((run_dir / "results.json").read_text())
    assert list(results["datasets"]) == ["heldout", "others"]
    for name, summary in results["datasets"].items():
        assert list(summary["metrics"]) == ["greedy", "mean@6", "pass@2", "pass@4", "pass@6", "maj@6"]
        rows = questions(run_dir, name)
        assert len(rows) == summary["num_questions"] == 10
        greedy = sum(row["greedy"]["is_correct"] for row in rows) / 10
        sampled = [sample for row in rows for sample in row["samples"]]
        assert summary["metrics"]["greedy"]["value"] == pytest.approx(greedy)
        mean = sum(sample["is_correct"] for sample in sampled) / 60
        assert summary["metrics"]["mean@6"]["value"] == pytest.approx(mean)
        solved = sum(any(sample["is_correct"] for sample in row["samples"]) for row in rows)
        assert summary["metrics"]["pass@6"]["value"] == pytest.approx(solved / 10)
        assert sum(summary["sampled"]["finish_reasons"].values()) == 60
        assert summary["sampled"]["num_unjudged"] == summary["greedy"]["num_unjudged"] == 0
        assert 0 < mean < 1  # a model that answers right now and then
    assert "heldout" in done.stdout and "maj@6" in done.stdout and "95% low" in done.stdout
    assert "run 140/140 answer" in (run_dir / "log.txt").read_text()


def test_samples_vote_with_their_answers(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Whatever the random model answers: samples with one answer vote alike, for the first of them."""
    run_dir, _ = finished
    for row in questions(run_dir, "heldout"):
        assert row["greedy"]["vote"] is None
        keys = [None if sample["extracted"] is None else answer_key(sample["extracted"]) for sample in row["samples"]]
        for sample, key in zip(row["samples"], keys, strict=True):
            assert sample["vote"] == (None if key is None else keys.index(key))
            assert (sample["status"] == "correct") == sample["is_correct"]


def test_finished_datasets_are_not_asked_again(
    finished: tuple[Path, subprocess.CompletedProcess[str]], eval_config: Settings, command_line: Run, tmp_path: Path
) -> None:
    """As after a kill between the datasets: one is kept as it is, the other one comes out the same."""
    run_dir, done = finished
    kept, lost = run_dir / "questions" / "heldout.jsonl", run_dir / "questions" / "others.jsonl"
    before = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.unlink()
    (run_dir / "results.json").unlink()
    again = command_line("eval", eval_config | {"run_dir": str(run_dir)}, tmp_path / "eval.yaml")
    assert again.returncode == 0, again.stderr
    assert (kept.stat().st_mtime_ns, lost.read_bytes()) == before
    assert "heldout: finished before" in again.stderr
    assert again.stdout == done.stdout


def test_two_processes_give_the_same_answers(
    finished: tuple[Path, subprocess.CompletedProcess[str]], eval_config: Settings, command_line: Run, tmp_path: Path
) -> None:
    run_dir, done = finished
    settings = eval_config | {"run_dir": str(tmp_path / "run"), "parallel": {"data": 2}}
    twice = command_line("eval", settings, tmp_path / "eval.yaml")
    assert twice.returncode == 0, twice.stderr
    assert twice.stdout == done.stdout
    compared = subprocess.run(
        [sys.executable, "-m", "megatron_oreal.cli", "compare", str(run_dir), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    rows = [line.split() for line in compared.stdout.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        [name, "10", m] for name in ("heldout", "others") for m in ("greedy", "mean@6")
    ]
    assert all(row[5:8] == ["0", "0", "0"] and row[-2] == "1" for row in rows)


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        (['{"id": "1", "prompt": "1+1="}'], [], "eval.prompts.new: .* line 1: answer is missing; give a non-empty"),
        (['{"id": "1", "prompt": "1+1=", "answer": ""}'], [], "eval.prompts.new: .* line 1: answer is empty; give"),
        ([], [], "eval.prompts.new: .* is empty; it needs at least one line"),
        (None, ["eval.prompts={}"], "eval.prompts names no dataset: give eval.prompts.NAME=FILE"),
        (None, ["eval.num_samples=0", "eval.greedy=false"], "eval.num_samples=0 with eval.greedy=false measures"),
        (None, ["eval.pass_at=[8]"], "eval.pass_at: 8 exceeds eval.num_samples=6; raise it"),
        (None, ["rollout.temperature=0"], "rollout.temperature=0 makes all samples alike: set eval.num_samples=0"),
        (None, ["eval.prompts={a/b: c}"], "eval.prompts: 'a/b' cannot name a file"),
        (None, ["eval.num_samples=7"], r"run_dir: .* belongs to another configuration \(eval.num_samples: 6 -> 7\)"),
        (None, ["eval.prompts.heldout={others}"], "eval.prompts.heldout is not the file that this run_dir was"),
    ],
)
def test_mistakes_are_one_line(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    eval_config: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    rows: list[str] | None,
    overrides: list[str],
    message: str,
) -> None:
    """In this process: starting torch for each of them would take longer than all of them."""
    import re

    import yaml

    from megatron_oreal import cli

    settings = eval_config | {"run_dir": str(finished[0])}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(settings))
    if rows is not None:
        (tmp_path / "new.jsonl").write_text("\n".join(rows))
        overrides = [f"eval.prompts.new={tmp_path / 'new.jsonl'}"]
    overrides = [override.replace("{others}", eval_config["eval"]["prompts"]["others"]) for override in overrides]
    monkeypatch.setattr(sys, "argv", ["megatron-oreal", "eval", str(tmp_path / "eval.yaml"), *overrides])
    with pytest.raises(SystemExit) as end:
        cli.main()
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("Error: ")]
    assert end.value.code == 2 and len(errors) == 1
    assert re.match(f"Error: {message}", errors[0]), errors[0]
