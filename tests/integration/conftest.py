"""A tiny task and configurations for whole runs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.metric_names import unknown_names
from tests.support.tiny_models import keep, write_tiny_model
from tests.support.tiny_task import VOCABULARY, write_lines, write_tokenizer


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl, heldout.jsonl and sft.jsonl."""
    folder = tmp_path_factory.mktemp("task")
    write_tokenizer(folder / "model")
    write_tiny_model(
        folder / "model",
        tied=True,
        num_layers=2,
        fill=keep,
        vocab_size=len(VOCABULARY),
        intermediate_size=64,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    rng = random.Random(0)
    prompts = [{"id": f"p{n}", "prompt": f"{n % 10}+{n // 10}=", "answer": str(n % 10)} for n in range(40)]
    write_lines(folder / "train.jsonl", prompts)
    write_lines(folder / "heldout.jsonl", prompts[:10])
    examples = []
    for _ in range(200):
        first, second = rng.randrange(10), rng.randrange(4)
        said = first if rng.random() < 0.5 else rng.randrange(10)
        examples.append({"prompt": f"{first}+{second}=", "response": f"\\boxed{{{said}}}"})
    write_lines(folder / "sft.jsonl", examples)
    return folder


@pytest.fixture(scope="session")
def sft_config(task: Path) -> dict[str, Any]:
    return {
        "run_dir": "set by the test",
        "num_steps": 6,
        "model": {"path": str(task / "model")},
        "data": {
            "examples": str(task / "sft.jsonl"),
            "format": "plain",
            "sequences_per_step": 16,
            "max_prompt_tokens": 8,
            "max_tokens": 32,
        },
        "rollout": {"max_new_tokens": 8},
        "policy": {"optimizer": {"lr": 0.01}},
        "eval": {"prompts": {"heldout": str(task / "heldout.jsonl")}, "every": 3},
        "checkpoint": {"every": 2, "keep_last": 2},
    }


@pytest.fixture(scope="session")
def warm_model(task: Path, sft_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that answers right now and then, made by `megatron-oreal sft`."""
    run_dir = tmp_path_factory.mktemp("warm") / "run"
    settings = sft_config | {"run_dir": str(run_dir), "num_steps": 100, "checkpoint": {"every": 100}}
    settings["eval"] = settings["eval"] | {"every": 100}
    done = megatron_oreal("sft", settings, run_dir.parent / "sft.yaml")
    assert done.returncode == 0, done.stderr
    return run_dir / "hf"


@pytest.fixture(scope="session")
def train_config(task: Path, warm_model: Path) -> dict[str, Any]:
    return {
        "run_dir": "set by the test",
        "num_steps": 6,
        "model": {"path": str(warm_model)},
        "data": {
            "prompts": str(task / "train.jsonl"),
            "format": "plain",
            "prompts_per_step": 5,
            "max_prompt_tokens": 8,
        },
        "rollout": {"group_size": 4, "max_new_tokens": 8},
        "algorithm": {"policy_freeze_steps": 1, "reward_model": {"optimizer": {"lr": 0.01}}},
        "policy": {"optimizer": {"lr": 0.001}},
        "eval": {"prompts": {"heldout": str(task / "heldout.jsonl")}, "every": 3},
        "checkpoint": {"every": 2, "keep_last": 2, "keep_best": 1, "best_metric": "eval/heldout/greedy"},
    }


def megatron_oreal(
    command: str, settings: dict[str, Any], file: Path, *overrides: str, timeout: float = 200
) -> subprocess.CompletedProcess[str]:
    """Runs the command line on `settings`, written to `file`. Each metric of the run must be on docs/metrics.md."""
    file.write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, "-m", "megatron_oreal.cli", command, str(file), *overrides],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    metrics = Path(settings["run_dir"]) / "metrics.jsonl"
    if done.returncode == 0 and metrics.is_file():
        names = {name for line in metrics.read_text().splitlines() for name in json.loads(line)}
        assert not unknown_names(names), f"docs/metrics.md has no row for {unknown_names(names)}"
    return done


@pytest.fixture(scope="session")
def command_line() -> Callable[..., subprocess.CompletedProcess[str]]:
    return megatron_oreal
