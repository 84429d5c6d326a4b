"""Does the same work on many items, in several processes, and shows a bar of the bytes that are done."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from megatron_oreal.observability.progress import ProgressBar

Item = TypeVar("Item")
Result = TypeVar("Result")
CountBytes = Callable[[int], None]
PR_SET_PDEATHSIG = 1
MADV_POPULATE_READ = 22
MEBIBYTE = 2**20

_work: Callable[[Any, CountBytes], Any]
_num_bytes_done: Any


def run_in_processes(
    work: Callable[[Item, CountBytes], Result], items: Sequence[Item], num_workers: int, total_bytes: int, name: str
) -> list[Result]:
    """Returns what `work` makes of each item, in the items' order; `work` also gets a function that counts bytes.

    A ValueError of a worker is raised here with its message. Raises OSError when a worker was killed.
    """
    # A forked process already has torch and the plan in memory; a fork is safe only on Linux.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    done = context.Value(ctypes.c_int64, 0)
    total = -(-total_bytes // MEBIBYTE)
    with ProgressBar(total, description=name, unit="MiB") as bar:
        if num_workers == 1 or len(items) == 1:
            return [work(item, lambda count: advance_to(bar, done, count)) for item in items]
        executor = ProcessPoolExecutor(min(num_workers, len(items)), context, _start, (work, done))
        try:
            futures = [executor.submit(_run, item) for item in items]
            waiting = set(futures)
            while waiting:
                finished, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
                advance_to(bar, done, 0)
                for future in finished:
                    future.result()
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise OSError(f"{name}: a worker process was killed, for its memory perhaps; try fewer --workers") from None
        except ValueError as error:
            raise ValueError(str(error)) from error
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def advance_to(bar: ProgressBar, done: Any, count: int) -> None:
    done.value += count
    if (behind := min(done.value // MEBIBYTE, bar.total) - bar.count) > 0:
        bar.advance(behind)


def _start(work: Callable[[Any, CountBytes], Any], done: Any) -> None:
    global _work, _num_bytes_done
    _work, _num_bytes_done = work, done
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the work
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(item: Any) -> Any:
    def count(num_bytes: int) -> None:
        with _num_bytes_done.get_lock():
            _num_bytes_done.value += num_bytes

    return _work(item, count)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_pages(tensor: torch.Tensor) -> None:
    """Loads all pages of a mapped tensor at once: loaded one by one, they would take most of a write's time."""
    if sys.platform != "linux" or tensor.nbytes < MEBIBYTE:
        return
    page = os.sysconf("SC_PAGESIZE")
    begin = tensor.data_ptr() // page * page
    length = tensor.data_ptr() + tensor.nbytes - begin
    # Linux before 5.14 refuses the call; the conversion then goes on without it.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_POPULATE_READ)
