"""Starts the processes of a run, adopts those that Slurm started, and ends them with the right exit code."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from megatron_oreal.config import ModelRunConfig, num_processes
from megatron_oreal.observability.full_disk import describe_os_error, is_full_disk
from megatron_oreal.observability.printable import printable
from megatron_oreal.parallel.stopping import REQUEUE, pass_on_stop_signal

PR_SET_PDEATHSIG = 1
# The environment variables that torchrun sets for each process.
TORCH_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RESUME = "the same command continues from the last checkpoint"
INTERRUPTED = "Interrupted by {}: " + RESUME


def adopt_slurm_task() -> None:
    """Sets torch's variables (RANK, WORLD_SIZE, ...) from those by which srun numbers its tasks.

    Under torchrun they are there. Without it, Slurm's numbers count: in containers of some images pyxis sets RANK and
    LOCAL_RANK of every task, and nothing else. Of a single task they are removed, for it starts its own processes.
    """
    environment = os.environ
    if "TORCHELASTIC_RUN_ID" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    count = environment["SLURM_STEP_NUM_TASKS"]
    if count == "1":
        if environment.get("WORLD_SIZE", "1") == "1":
            for name in TORCH_RANKS:
                environment.pop(name, None)
        return
    if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
        raise ValueError("srun: export MASTER_ADDR (the first node) and MASTER_PORT (a free port) before it")
    per_node = tasks_of_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment.get("SLURM_NODEID", "0")))
    environment |= {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": count}
    environment |= {"LOCAL_RANK": environment["SLURM_LOCALID"], "LOCAL_WORLD_SIZE": str(per_node)}


def tasks_of_node(counts: str, node: int) -> int:
    """Reads SLURM_STEP_TASKS_PER_NODE: "8(x16),4" means 16 nodes of 8 tasks, then one of 4."""
    for part in counts.split(","):
        tasks, _, repeats = part.partition("(x")
        num_nodes = int(repeats.rstrip(")") or "1")
        if node < num_nodes:
            return int(tasks)
        node -= num_nodes
    raise ValueError(f"SLURM_STEP_TASKS_PER_NODE={counts} has too few nodes for SLURM_NODEID: start the step with srun")


def launch(config: ModelRunConfig) -> None:
    """Starts this command again in every process of the layout, with torch's elastic launcher."""
    count = num_processes(config.parallel)
    set_threads(count)
    import torch

    if 0 < torch.cuda.device_count() < count:
        raise ValueError(
            f"parallel: {count} processes on {torch.cuda.device_count()} GPUs; lower parallel.data, or start with "
            "torchrun or srun on more nodes"
        )
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from megatron_oreal.parallel.rendezvous import STORE_FILE

    # The failing process prints the error; the launcher's own long report would hide it.
    logging.disable(logging.CRITICAL)
    try:
        # Only this user can open the folder. The launcher unpickles its store's contents, so it may not listen.
        with tempfile.TemporaryDirectory(prefix="megatron-oreal-") as folder:
            settings = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=count,
                run_id=f"megatron-oreal-{os.getpid()}",
                rdzv_backend="c10d",
                rdzv_endpoint=f"{folder}/launcher",
                rdzv_configs={"store_type": "file"},
                max_restarts=0,
                monitor_interval=0.1,
                logs_specs=DefaultLogsSpecs(log_dir=folder),  # the workers' error files
            )
            pass_on_stop_signal(Path(folder) / "stop")
            os.environ |= {STORE_FILE: f"{folder}/workers", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
            elastic_launch(settings, sys.executable)("-m", "megatron_oreal.cli", *sys.argv[1:])
    except ChildFailedError as error:
        exit_codes = [failure.exitcode for failure in error.failures.values()]
        if REQUEUE in exit_codes:
            sys.exit(REQUEUE)
        if all(code < 0 for code in exit_codes):  # All processes were killed by signals: none could report an error.
            fail(f"a process of the run was ended by {signal.Signals(-exit_codes[0]).name}; {RESUME}", 1)
        sys.exit(2 if 2 in exit_codes else 1)
    except SignalException as error:
        interrupted(error.sigval)


def set_threads(num_local_processes: int) -> None:
    """Gives each process as many threads as it has cores, unless the user has said. Precedes the import of torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_local_processes)))


def use_expandable_segments() -> None:
    """Lets CUDA memory grow in place, unless the user has set the allocator. Precedes the import of torch.

    Micro-batches and caches of every length leave gaps in fixed segments. Memory that is lent to other processes, as
    rollout.sglang.weight_transport=tensor does, must not lie in segments that grow.
    """
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"


def end_with_launcher() -> None:
    """Ends this process with its launcher: on Linux however that one dies, and silently when it passes on Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the command with one line on stderr for a user's mistake (exit code 2) and a failing machine (1).

    Other errors are defects and keep their traceback.
    """
    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except ValueError as error:
        if not is_ours(error):
            raise
        fail(str(error), 2)
    except (FloatingPointError, OSError) as error:  # the run diverged; a disk is full or a file not ours to write
        fail(describe_os_error(error), 1)
    except Exception as error:
        if not is_full_disk(error):
            raise
        fail(describe_os_error(error), 1)


def is_ours(error: BaseException) -> bool:
    """Returns whether our own code raised the error: its ValueErrors name field and fix, a library's is a defect."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and str(frame.tb_frame.f_globals.get("__name__")).startswith(
        ("megatron_oreal", "__main__")
    )


def is_lost_connection(error: RuntimeError) -> bool:
    return "RANK" in os.environ and any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def fail(message: str, exit_code: int) -> NoReturn:
    """Prints one line and exits. Of several processes one prints, and the launcher ends those that wait for it."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(30)
    click.echo(f"Error: {printable(' '.join(message.split()))}", err=True)
    if is_distributed():
        sys.stdout.flush()
        os._exit(exit_code)  # A normal exit tears NCCL down, which waits for ranks that wait for this one.
    sys.exit(exit_code)


def is_distributed() -> bool:
    """Returns whether this process has joined other ranks; a process that has not imported torch has not."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


def on_interrupt(_signal_number: int, _frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, and ends the process ten seconds later if Python drops it (inside a destructor)."""

    def end() -> None:
        click.echo(INTERRUPTED.format(signal.SIGINT.name), err=True)
        os._exit(128 + signal.SIGINT)

    timer = threading.Timer(10.0, end)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def interrupted(signal_number: signal.Signals) -> NoReturn:
    """Exits with the code that shells expect of a command that a signal ended."""
    click.echo(INTERRUPTED.format(signal_number.name), err=True)
    sys.exit(128 + signal_number)
