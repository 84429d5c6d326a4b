"""A checkpoint of each layout is resumed by others, in one launch of two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oreal.checkpoint.pieces import rows_and_columns
from tests.support.paths import ROOT


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layout_reads_the_checkpoints_of_the_others(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    run = subprocess.run(
        [*command, "tests.support.workers.checkpoint_worker", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]
    assert run.stdout.count("passed") == 2


@pytest.mark.parametrize("num_columns", [1, 2, 5])
def test_a_range_of_a_matrix_is_at_most_three_rectangles(num_columns: int) -> None:
    for begin in range(12):
        for end in range(begin, 12):
            found = list(rows_and_columns(begin, end, num_columns))
            elements = [
                row * num_columns + column
                for top, bottom, left, right in found
                for row in range(top, bottom)
                for column in range(left, right)
            ]
            assert elements == list(range(begin, end)) and len(found) <= 3
