"""Ends a run early and orderly: on SIGUSR1 it saves after the step that it is in, and exits to be started again.

Slurm sends the signal before a job's time limit. It may reach every process of a job step, workers and servers too, so
it stays blocked in all of them, which inherit that from the command, and the first rank looks whether it is pending.
The launcher of a run on one node gets it alone, and leaves a file for the first rank. Imports no torch at its top.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

STOP_FILE = "MEGATRON_OREAL_STOP_FILE"  # the launcher's word to its workers: the file that asks them to stop
REQUEUE = 75  # The exit code of a run that was stopped: EX_TEMPFAIL, try again.


class RunStopped(Exception):
    """The run was asked to stop; it has saved a checkpoint and ends."""


def block_stop_signal() -> None:
    """Keeps SIGUSR1 pending in this process and in all that it starts. Call it before other threads exist."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def pass_on_stop_signal(file: Path) -> None:
    """Makes `file` when SIGUSR1 comes, in a thread that lives as long as the process, and names it to the workers."""
    os.environ[STOP_FILE] = str(file)

    def wait() -> None:
        signal.sigwait({signal.SIGUSR1})
        file.touch()

    threading.Thread(target=wait, daemon=True).start()


def is_asked_to_stop() -> bool:
    """Returns whether this process, or its launcher, has received SIGUSR1."""
    return signal.SIGUSR1 in signal.sigpending() or (STOP_FILE in os.environ and Path(os.environ[STOP_FILE]).exists())
