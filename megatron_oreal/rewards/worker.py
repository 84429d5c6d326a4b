"""Decides comparisons that need algebra, in a worker process: one JSON line in, one or two JSON lines out.

`worker_pool` runs this file as a script without torch, so that it starts in a fraction of a second. If a comparison
uses up its CPU budget, a signal ends the process; no Python code can delay that signal's action.

The process parses text that a model wrote, so its rights are restricted: it has no network, starts no processes, writes
no files, and on a kernel with Landlock reads only the files that Python needs.

    in   {"answer": ..., "prediction": ...}
    out  {"ready": true}; for each comparison {"answer": true} when the reference has been evaluated by itself, then
         {"is_equal": true} or {"is_equal": null} when the comparison itself failed
"""

from __future__ import annotations

import sys

sys.path.pop(0)  # this file's folder, whose module names must not hide others

import argparse
import ctypes
import importlib.util
import json
import logging
import os
import resource
import signal
from collections.abc import Sequence
from pathlib import Path

# Landlock's system calls, whose numbers are the same on all processors, and two rights of its first version.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_BENEATH_PATH = 1
ALL_RIGHTS, EXECUTE, READ_FILE, READ_FOLDER = (1 << 13) - 1, 1 << 0, 1 << 2, 1 << 3
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev")
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
RECURSION_LIMIT = 5000
MAX_OPEN_FILES = 64


def load_package() -> None:
    """Makes `megatron_oreal` the package that contains this file, even if another version is installed."""
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


def confine(parent_pid: int, memory_bytes: int, more_readable: Sequence[str] = ()) -> None:
    """Limits memory, forbids files, processes and network, and ends this process with its parent's thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no comparison needs to write files
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        system = ctypes.CDLL(None)
        system.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        restrict_files(system, [*needed_files(), *more_readable])
        system.unshare(CLONE_NEWUSER | CLONE_NEWNET)  # removes the network if the kernel allows it
        system.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # last, because a change of credentials clears it
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if os.getppid() != parent_pid:
        sys.exit(1)  # the parent ended before this worker was ready


class RulesetAttributes(ctypes.Structure):
    _fields_ = (("handled_rights", ctypes.c_uint64),)


class PathBeneathAttributes(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def needed_files() -> list[str]:
    """Returns what this process may read: Python, the libraries, and this package, but not the rest of the checkout."""
    package = Path(__file__).resolve().parents[1]
    libraries = [
        entry
        for entry in (*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(":"))
        if entry and (Path(entry).resolve() != package.parent or package.parent.name.endswith("-packages"))
    ]
    return [*SYSTEM_FOLDERS, sys.prefix, sys.base_prefix, *libraries, str(package)]


def restrict_files(system: ctypes.CDLL, readable: list[str]) -> None:
    """Restricts this process's file access to reading these files and folders.

    Without this limit, a single defect of a library could let the parsed text read the user's keys. A kernel before
    5.13, or one without Landlock, refuses the first call, and then nothing changes.
    """
    rights = RulesetAttributes(ALL_RIGHTS)
    ruleset = system.syscall(CREATE_RULESET, ctypes.byref(rights), ctypes.sizeof(rights), 0)
    if ruleset < 0:
        return
    for path in readable:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = READ_FILE | EXECUTE | (READ_FOLDER if Path(path).is_dir() else 0)
        beneath = PathBeneathAttributes(allowed, opened)
        system.syscall(ADD_RULE, ruleset, RULE_BENEATH_PATH, ctypes.byref(beneath), 0)
        os.close(opened)
    system.syscall(RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--cpu-seconds", type=float, required=True)
    parser.add_argument("--memory-bytes", type=int, required=True)
    parser.add_argument("--function", default="")  # the user's reward function, in place of comparisons
    options = parser.parse_args()

    # Output that the libraries print must not mix with the replies.
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    # The user's function may be in, and read from, the working directory and every folder of Python's module path.
    confine(options.parent_pid, options.memory_bytes, [str(Path.cwd()), *sys.path] if options.function else [])
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
        except Exception:  # noqa: BLE001  # an algebra system may raise anything; the caller counts the failure
            equal = None
        comparer.budget.stop()
        os.write(replies, json.dumps({"is_equal": equal}).encode() + b"\n")


if __name__ == "__main__":
    main()
