"""The same checks on CUDA that tests/models makes on a CPU, with as many processes as there are GPUs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.reference import linear_logprob_reference
from tests.support.paths import ROOT

pytestmark = pytest.mark.gpu
WORKER = "tests.support.workers.layouts_worker"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_layouts_agree_with_transformers_and_each_other(num_processes: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < num_processes:
        pytest.skip(f"needs {num_processes} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    run = subprocess.run(
        [*command, "-m", WORKER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_logprob_agrees_with_its_definition(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(257, 128, device="cuda", generator=generator).to(dtype)
    weight = (0.1 * torch.randn(1031, 128, device="cuda", generator=generator)).to(dtype)
    target = torch.randint(1000, (257,), device="cuda", generator=generator)
    actual = linear_logprob(hidden, weight, target, valid_vocab=1000, entropy=True)
    wanted = linear_logprob_reference(hidden.double(), weight.double(), target, valid_vocab=1000)
    for ours, exact in zip(actual, wanted, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), exact, atol=1e-4 if dtype is torch.float32 else 2e-2, rtol=0)
