"""Every parallel layout against transformers and against the others: a few launches with many checks each."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_processes", [1, 4])
def test_layouts_agree_with_transformers_and_each_other(num_processes: int, tmp_path: Path) -> None:
    run_worker("layouts_worker", num_processes, tmp_path)


@pytest.mark.timeout(900)
def test_all_algorithms_learn_the_same_under_context_parallelism(tmp_path: Path) -> None:
    """Their metrics agree to 1e-5, and the gradients of every model to 1e-6 of the norm."""
    run_worker("context_worker", 4, tmp_path)


def run_worker(name: str, num_processes: int, folder: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    run = subprocess.run(
        [*command, "-m", f"tests.support.workers.{name}", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.count("passed") == num_processes
