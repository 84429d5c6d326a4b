"""Every parallel layout against transformers, in one launch of four processes and one of a single process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

WORKER = "tests.support.workers.layouts_worker"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("num_processes", [1, 4])
def test_layouts_agree_with_transformers_and_each_other(num_processes: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    run = subprocess.run(
        [*command, "-m", WORKER, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=800, check=False
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.count("passed") == num_processes
