"""A real run's checkpoint, of tensor and pipeline parallel ranks, converted: it is what the run exported itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from tests.conversion.test_conversion import assert_same_tensors, tensors_of
from tests.support.tiny_checkpoints import write_checkpoint
from tests.support.tiny_task import VOCABULARY, write_lines, write_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("model", ["qwen2-tied", "qwen3"])
def test_a_runs_checkpoint_is_what_the_run_exports(tmp_path: Path, model: str) -> None:
    hf = write_checkpoint(tmp_path / "model", model, vocab_size=len(VOCABULARY), num_files=1)
    write_tokenizer(tmp_path / "tokenizer")
    write_lines(tmp_path / "sft.jsonl", [{"prompt": f"{n}+1=", "response": f"\\boxed{{{n}}}"} for n in range(10)])
    settings = {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 2,
        "model": {"path": str(hf), "tokenizer": str(tmp_path / "tokenizer")},
        "parallel": {"tensor": 2, "pipeline": 2},
        "data": {
            "examples": str(tmp_path / "sft.jsonl"),
            "format": "plain",
            "sequences_per_step": 4,
            "max_prompt_tokens": 8,
            "max_tokens": 32,
        },
        "policy": {"optimizer": {"lr": 0.01}},
        "rollout": {"max_new_tokens": 8},
        "checkpoint": {"every": 2},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_oreal.cli", "sft", str(tmp_path / "sft.yaml")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    policy = tmp_path / "run" / "checkpoints" / "step_000002" / "policy"
    conversion.megatron_to_hf(policy, tmp_path / "out", ConversionOptions())
    assert_same_tensors(tmp_path / "out", tmp_path / "run" / "hf")
    before = tensors_of(hf)["model.norm.weight"]
    assert not torch.equal(tensors_of(tmp_path / "out")["model.norm.weight"], before)
