"""What the patches of torch for the CPU leave intact."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

PROGRAM = """
import torch
from megatron_oreal.models import megatron_on_cpu

assert megatron_on_cpu.enable()
double = torch.compile(lambda x: x + x, backend="eager", fullgraph=True)
assert double(torch.ones(2)).tolist() == [2.0, 2.0]
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is nothing to patch")
def test_torch_compile_works_after_the_patches() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
