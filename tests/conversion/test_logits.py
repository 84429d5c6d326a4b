"""Megatron's logits against transformers', every family in one process of its own (Megatron patches torch there)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.tiny_checkpoints import MODELS


def test_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.workers.logits_worker", str(tmp_path), *MODELS]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0 and run.stdout.endswith("passed\n"), run.stdout[-2000:] + run.stderr[-4000:]
