"""The head's gradient under Megatron's own data parallelism."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

WORKER = "tests.support.workers.main_grad_worker"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_head_writes_into_main_grad(tmp_path: Path, num_processes: int) -> None:
    """Also where Megatron's hook waits for a gradient, because it starts the reduction of a bucket (gloo)."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m", WORKER]
    run = subprocess.run(
        [sys.executable, *launch, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "passed"
