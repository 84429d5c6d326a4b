"""megatron-core loads what was converted, in every layout; and what it saves itself is converted back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from tests.conversion.test_conversion import assert_same_tensors
from tests.support.paths import ROOT
from tests.support.tiny_checkpoints import write_checkpoint

MODELS = {"qwen2": "qwen2", "qwen2-tied": "qwen2-tied", "qwen3": "qwen3", "moe": "qwen3_moe", "scalar": "qwen2"}


@pytest.mark.timeout(600)
def test_megatron_core_loads_every_layout(tmp_path: Path) -> None:
    for name, model in MODELS.items():
        head = "scalar" if name == "scalar" else "lm"
        hf = write_checkpoint(tmp_path / name, model, torch.bfloat16, head)
        conversion.hf_to_megatron(hf, tmp_path / f"{name}-mcore", ConversionOptions(), head)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    worker = ["-m", "tests.support.workers.load_worker", str(tmp_path), *MODELS]
    run = subprocess.run([*command, *worker], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.count("passed") == 4
    for name in MODELS:
        head = "scalar" if name == "scalar" else "lm"
        saved = tmp_path / f"{name}-saved"
        conversion.megatron_to_hf(saved, tmp_path / f"{name}-back", ConversionOptions(), tmp_path / name, head)
        assert_same_tensors(tmp_path / f"{name}-back", tmp_path / name)
