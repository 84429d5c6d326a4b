"""The worker process: decides comparisons that take algebra, one JSON line in, one or two JSON lines out.

Run as a script by `worker_pool`, so that it imports no torch: started in a fraction of a second. A comparison that
spends its CPU budget ends the process, by a signal whose action nothing in Python can delay.

    in   {"answer": ..., "prediction": ...}
    out  {"ready": true}; for each comparison {"answer": true} when the reference has been evaluated by itself, then
         {"is_equal": true} or {"is_equal": null} when the comparison itself failed
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this file's folder: its module names must not hide anyone's

import argparse
import ctypes
import importlib.util
import json
import logging
import os
import resource
import signal
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
RECURSION_LIMIT = 5000
MAX_OPEN_FILES = 64


def load_package() -> None:
    """Makes `megatron_oreal` the package that this file belongs to, whatever else is installed."""
    sys.dont_write_bytecode = True
    folder = Path(__file__).parents[1]
    spec = importlib.util.spec_from_file_location(
        folder.name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[folder.name] = package
    spec.loader.exec_module(package)


class CpuBudget:
    """Ends the process when more CPU time than this has been spent since the last start."""

    def __init__(self, cpu_seconds: float) -> None:
        self.cpu_seconds = cpu_seconds

    def start(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds)

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def confine(parent_pid: int, memory_bytes: int) -> None:
    """Limits of this process: memory, no files written, no processes, no network; it ends with its parent's thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # nothing that is parsed here has a reason to write files
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        system = ctypes.CDLL(None)
        system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        system.unshare(CLONE_NEWUSER | CLONE_NEWNET)  # where the kernel allows it: no network
        system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last: other credentials clear it
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if os.getppid() != parent_pid:
        sys.exit(1)  # the parent ended before its worker was ready: nobody is there to be told


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--cpu-seconds", type=float, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--function", default="")  # a reward of the user's own, in place of comparisons
    options = parser.parse_args()

    # Whatever the libraries print must not reach the protocol.
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    confine(options.parent_pid, options.memory_bytes)
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(RECURSION_LIMIT)
    load_package()
    if options.function:
        from megatron_oreal.rewards.function_worker import serve_function

        serve_function(options.function, CpuBudget(options.cpu_seconds), replies)
        return
    from megatron_oreal.rewards.comparer import Comparer

    comparer = Comparer(CpuBudget(options.cpu_seconds))
    comparer.is_same(r"\sqrt{2}", "2^{1/2}")
    comparer.budget.stop()
    os.dup2(null, 2)

    os.write(replies, b'{"ready": true}\n')
    for line in sys.stdin.buffer:
        job = json.loads(line)
        equal: bool | None = None
        try:
            comparer.evaluate_reference(job["answer"])
            os.write(replies, b'{"answer": true}\n')
            equal = comparer.is_same(job["prediction"], job["answer"])
        except Exception:  # noqa: BLE001  # anything may come out of an algebra system; the caller counts it
            equal = None
        comparer.budget.stop()
        os.write(replies, json.dumps({"is_equal": equal}).encode() + b"\n")


if __name__ == "__main__":
    main()
