"""A run that starts from what megatron-oreal convert wrote."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions


@pytest.mark.timeout(300)
def test_a_run_starts_from_a_torch_dist_directory(
    train_config: dict[str, Any],
    warm_model: Path,
    command_line: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """The policy is frozen in the first step: it comes out as it went in."""
    mcore = tmp_path / "mcore"
    conversion.hf_to_megatron(warm_model, mcore, ConversionOptions())
    settings = train_config | {"run_dir": str(tmp_path / "run"), "model": {"path": str(mcore)}, "num_steps": 1}
    reward_model = train_config["algorithm"]["reward_model"] | {"path": str(mcore)}
    settings["algorithm"] = train_config["algorithm"] | {"reward_model": reward_model}
    done = command_line("train", settings, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    before = load_file(warm_model / "model.safetensors")
    after = load_file(tmp_path / "run" / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {"config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "run" / "hf").iterdir()}
