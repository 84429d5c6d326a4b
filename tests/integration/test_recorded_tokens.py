"""A run that records tokens: every rank's values reach the file, and no number of the run changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from megatron_oreal.reports.viewer.samples import read_run

Run = Callable[..., CompletedProcess[str]]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.timeout(600)
def test_tokens_are_recorded_by_data_parallel_ranks(
    train_config: dict[str, Any], command_line: Run, tmp_path: Path
) -> None:
    for name, num_groups in [("silent", 0), ("recording", 4)]:
        settings = train_config | {"run_dir": str(tmp_path / name), "num_steps": 2, "parallel": {"data": 2}}
        settings |= {"logging": {"rollout_tokens": num_groups}, "eval": {}, "checkpoint": {"export_hf": False}}
        done = command_line("train", settings, tmp_path / "config.yaml")
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "silent/rollout_tokens").exists()
    metrics = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(tmp_path / name / "metrics.jsonl")]
        for name in ("silent", "recording")
    ]
    assert metrics[0] == metrics[1]
    num_trained = 0
    for step in range(2):
        samples = rows(tmp_path / f"recording/rollouts/step_{step:06d}.jsonl")
        recorded = rows(tmp_path / f"recording/rollout_tokens/step_{step:06d}.jsonl")
        assert [row["row"] for row in recorded] == list(range(16)) and {row["group"] for row in samples} == set(
            range(5)
        )
        for sample, row in zip(samples, recorded, strict=False):
            assert "".join(row["texts"]) == sample["response"] and len(row["texts"]) == sample["num_tokens"]
            assert sum(row["logprobs"]) == pytest.approx(sample["logprob"], abs=0.05)
            if "differences" in row:
                num_trained += 1
                assert max(map(abs, row["differences"])) < 1e-4 and 0 <= min(row["weights"]) <= max(row["weights"]) <= 1
                assert (row["advantages"][0] > 0) == (sample["status"] == "correct")
    # Both steps train on the same sequences as the silent run, whose counts say how many there were.
    trained = sum(row.get("train/num_sequences", 0) for row in metrics[1])
    assert 0 < num_trained <= trained
    assert read_run(tmp_path / "recording").samples[0].tokens is not None
