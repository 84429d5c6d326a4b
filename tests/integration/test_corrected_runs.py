"""A whole run with a teacher of another size, held-back tokens, a corrected loss and truncated samples."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import keep, write_tiny_model
from tests.support.tiny_task import VOCABULARY

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def config(train_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    teacher = tmp_path_factory.mktemp("teacher") / "model"
    teacher.mkdir()
    for file in Path(train_config["model"]["path"]).glob("tokenizer*"):
        shutil.copy(file, teacher)
    write_tiny_model(
        teacher,
        tied=True,
        num_layers=3,
        fill=keep,
        vocab_size=len(VOCABULARY) + 4,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    algorithm = {"name": "outcome", "distill_coef": 0.1, "teacher": str(teacher), "whiten_advantages": True}
    algorithm |= {"covariance": "clip", "covariance_share": 0.1, "covariance_low": -5.0, "overlong_tokens": 4}
    rollout = {"temperature": 0.8, "top_p": 0.9, "loss_support": "sampled", "corrects": "always"}
    return train_config | {
        "num_steps": 2,
        "parallel": {"tensor": 2},
        "algorithm": algorithm,
        "rollout": train_config["rollout"] | rollout | {"correction": "icepop"},
        "eval": {},
        "checkpoint": {"every": 2, "export_hf": False},
    }


def test_samples_are_on_policy_although_they_are_tempered_and_truncated(
    config: dict[str, Any], command_line: Run, tmp_path: Path
) -> None:
    done = command_line("train", config | {"run_dir": str(tmp_path / "run")}, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    first, *_ = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 0 < first["policy/mismatch"] < 1e-4
    assert first["policy/importance_mean"] == pytest.approx(1.0, abs=1e-4)
    assert first["policy/importance_masked_share"] == 0.0
    assert 0.05 < first["train/covariance_chosen_share"] <= 0.1
    assert first["policy/kl"] > 0 and first["train/advantage_std"] > 0
    inputs = json.loads((tmp_path / "run" / "inputs.json").read_text())
    assert inputs["algorithm.teacher"] != inputs["model.path"]
    assert "losses are within the tokens that top_p=0.9, top_k=0 keep" in (tmp_path / "run" / "log.txt").read_text()


def test_a_teacher_that_is_not_there_is_one_line(config: dict[str, Any], command_line: Run, tmp_path: Path) -> None:
    settings = config | {"run_dir": str(tmp_path / "run"), "num_steps": 1}
    settings["algorithm"] = settings["algorithm"] | {"teacher": str(tmp_path / "nowhere")}
    done = command_line("train", settings, tmp_path / "config.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "algorithm.teacher: " in done.stderr and "does not exist" in done.stderr
    assert not (tmp_path / "run").exists()
