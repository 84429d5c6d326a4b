"""Runs a supervised run, as one of two ranks, in which the second step fails in one way.

    hang_worker.py CONFIG sleep|collective|stopped

sleep: rank 1 sleeps within the update. collective: rank 1 waits for a message that rank 0 never sends. stopped: the
whole process of rank 1 is stopped.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.config import SftConfig, load_config
from megatron_oreal.train import sft
from megatron_oreal.types import Metrics

update = Sft.update


def oversleep() -> None:
    time.sleep(1000)


def go_wrong(how: str) -> None:
    match how:
        case "sleep":
            oversleep()
        case "collective":
            dist.recv(torch.zeros(1), src=0)
        case "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)


def main(config: str, how: str) -> None:
    def faulty(self: Sft, sequences: object, step: int) -> Metrics:
        if step == 1 and dist.get_rank() == 1:
            go_wrong(how)
        return update(self, sequences, step)  # type: ignore[arg-type]

    Sft.update = faulty  # type: ignore[assignment,method-assign]
    sft(load_config(SftConfig, Path(config), []))


if __name__ == "__main__":
    main(*sys.argv[1:])
