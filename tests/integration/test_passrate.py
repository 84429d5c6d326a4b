"""`megatron-oreal passrate`: what it writes, and that a killed run ends with the same numbers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.data.prompts import read_prompts, repeat_by_pass_rate

Settings = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line


@pytest.fixture(scope="module")
def settings(task: Path, warm_model: Path) -> Settings:
    return {
        "model": {"path": str(warm_model)},
        "data": {"format": "plain", "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8},
        "eval": {"prompts": {"train": str(task / "train.jsonl")}, "num_samples": 8, "prompts_per_batch": 7},
    }


def test_pass_rates_are_measured_and_a_killed_run_continues(
    task: Path, settings: Settings, command_line: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = command_line("passrate", settings | {"run_dir": str(run_dir)}, tmp_path / "a.yaml")
    assert done.returncode == 0, done.stderr
    written = run_dir / "prompts" / "train.jsonl"
    prompts = read_prompts(written, "data.prompts")
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in read_prompts(task / "train.jsonl", "x")]
    rates = [prompt.pass_rate for prompt in prompts if prompt.pass_rate is not None]
    assert len(rates) == 40 and all(8 * rate == int(8 * rate) for rate in rates)
    assert 0 < sum(rates) / 40 < 1  # a model that answers right now and then
    num_hard = sum(rate < 0.2 for rate in rates)
    assert len(repeat_by_pass_rate(prompts, [(0.2, 6)])) == 6 * num_hard
    assert f"train: {written}" in done.stdout
    assert "run 320/320 answer" in (run_dir / "log.txt").read_text()

    kept, before = run_dir / "pass_rates" / "train.jsonl", written.read_bytes()
    records = kept.read_bytes()
    kept.write_bytes(records[: len(records) // 2])
    written.unlink()
    again = command_line("passrate", settings | {"run_dir": str(run_dir)}, tmp_path / "b.yaml")
    assert again.returncode == 0, again.stderr
    assert "train: 14 of 40 prompts were measured before" in again.stderr
    assert (kept.read_bytes(), written.read_bytes(), again.stdout) == (records, before, done.stdout)

    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps(row | {"answer": "1"}) + "\n" for row in rows))
    refused = command_line(
        "passrate", settings | {"run_dir": str(run_dir)}, tmp_path / "c.yaml", f"eval.prompts.train={other}"
    )
    assert refused.returncode == 2
    assert "eval.prompts.train is not the file whose pass rates" in refused.stderr
