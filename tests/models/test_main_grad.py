"""The head's gradient under Megatron's own data parallelism."""

import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

WORKER = "tests.support.workers.main_grad_worker"


def test_the_head_writes_into_main_grad(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", WORKER, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-4000:]
    assert run.stdout.splitlines()[-1] == "passed"
