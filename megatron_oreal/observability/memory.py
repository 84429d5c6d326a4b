"""Measures the memory of this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from megatron_oreal.types import Metrics

GIB = 2**30
STATM = Path("/proc/self/statm")


def memory_of_process() -> Metrics:
    """Returns the GiB that this process uses now: resident on the host, and in tensors on its GPU.

    Leaves out a number that the system does not report.
    """
    found: Metrics = {}
    if STATM.is_file():
        num_pages = int(STATM.read_text().split()[1])
        found["time/memory/host_gib"] = num_pages * os.sysconf("SC_PAGE_SIZE") / GIB
    torch = sys.modules.get("torch")  # A process without torch uses no GPU memory.
    if torch is not None and torch.cuda.is_initialized():
        found["time/memory/gpu_gib"] = torch.cuda.memory_allocated() / GIB
    return found
