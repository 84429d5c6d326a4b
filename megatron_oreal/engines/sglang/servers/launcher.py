"""Runs one SGLang server in the servers' own environment, and ends all of its processes when the trainer ends.

`process.py` runs this file as a script; it imports nothing of this package. It makes two processes: a supervisor that
needs the standard library alone, and the server. The supervisor's standard input connects it with the trainer: it gets
one JSON line with the keys, and ends the server when the input is closed, which happens even if the trainer is killed.

    argv    flags of SGLang, or --router and those of sglang-router
    stdin   {"api_key": ..., "admin_key": ..., "grace_seconds": ..., "log": the file that stderr is}, and for https
            "certificate" and "private_key", in PEM
    stdout  {"pid": of the server}
    status  2: a flag is wrong, and the log's last line says which

On a CPU (SGLANG_USE_CPU_ENGINE=1), two modules that have no build for it get stand-ins, here and in the processes that
the server spawns: they run this file again under another name.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ != "megatron_oreal.engines.sglang.servers.launcher":
    # This file's folder leaves the path, because its module names would hide the standard library's.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

import argparse
import ctypes
import difflib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any, NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
POLL_SECONDS = 0.2
SCAN_SECONDS = 2.0  # between two checks of the server's files in shared memory
MAX_LOG_BYTES = 64 * 2**20  # of the log; LOG.1 may have as many
SHARED_MEMORY = re.compile(r" /dev/shm/(sgl|sem\.mp-)[^ ]*$")
LIBRARIES: list[Any] = []  # torch's operators exist only as long as the library objects that define them
SERVE = "--serve"  # the first argument of the server; the supervisor has no such argument
ROUTER = "--router"  # precedes the router's flags


def supervise(flags: list[str]) -> int:
    """Runs the server until it ends, the trainer closes the pipe, or SIGTERM comes. Returns its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer handles Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if sys.platform == "linux":  # the server's orphans become children of this process
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    settings = json.loads(sys.stdin.readline())
    shared: set[Path] = set()
    with tempfile.TemporaryDirectory(prefix="sglang-") as folder:  # SGLang does not remove its sockets
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), SERVE, *flags, *write_certificate(settings, Path(folder))],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            start_new_session=True,
            preexec_fn=end_with_supervisor,
            env=os.environ | {"TMPDIR": folder},
        )
        try:
            assert server.stdin is not None
            server.stdin.write(json.dumps(settings).encode() + b"\n")
            server.stdin.close()
            print(json.dumps({"pid": server.pid}), flush=True)
            if wait_while_wanted(server, settings["log"], shared):
                server.terminate()
                wait_at_most(server, settings["grace_seconds"])
        except BrokenPipeError:
            pass  # the server or the trainer has already ended
        finally:
            status = server.poll()
            end_tree(server, shared)
    return 128 + signal.SIGKILL if status is None else status if status >= 0 else 128 - status


def write_certificate(settings: dict[str, Any], folder: Path) -> list[str]:
    """Removes the certificate from the settings, if there is one, and returns SGLang's flags for it."""
    flags = []
    for name, flag in (("certificate", "--ssl-certfile"), ("private_key", "--ssl-keyfile")):
        if name in settings:
            file = folder / f"{name}.pem"  # in a folder that other users cannot open
            file.write_text(settings.pop(name))
            flags.append(f"{flag}={file}")
    return flags


def end_with_supervisor() -> None:
    """Runs in the server's process. Makes the kernel end the server together with the supervisor's only thread."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def wait_while_wanted(server: subprocess.Popen[bytes], log: str, shared: set[Path]) -> bool:
    """Waits; returns False if the server has ended, and True if the trainer no longer needs it.

    Adds the server's files in shared memory to `shared`, because killed processes do not remove them, and cannot be
    asked for them.
    """
    parent, next_scan = os.getppid(), 0.0
    while server.poll() is None:
        if time.monotonic() >= next_scan:
            shared |= shared_memory(descendants(os.getpid()))
            next_scan = time.monotonic() + SCAN_SECONDS
        readable, _, _ = select.select([sys.stdin], [], [], POLL_SECONDS)
        # A process that the trainer forked may keep the pipe open.
        if (readable and not os.read(sys.stdin.fileno(), 1)) or os.getppid() != parent:
            return True
        shorten_log(log)
    return False


def shorten_log(log: str) -> None:
    """Moves a log that is too long to LOG.1, and overwrites the older one, so that a run cannot fill the disk.

    The server continues to write to the same file, from its new beginning. Lines that it writes during the move are
    lost.
    """
    if os.fstat(sys.stderr.fileno()).st_size <= MAX_LOG_BYTES:
        return
    try:
        source = os.open(log, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            if os.path.sameopenfile(source, sys.stderr.fileno()):
                temporary = f"{log}.{os.getpid()}.tmp"
                target = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with os.fdopen(source, "rb", closefd=False) as old, os.fdopen(target, "wb") as new:
                    shutil.copyfileobj(old, new)
                os.replace(temporary, f"{log}.1")
        finally:
            os.close(source)
    except OSError:
        pass  # a full disk loses the older lines, but must not end the run
    os.ftruncate(sys.stderr.fileno(), 0)


def wait_at_most(server: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        pass


def end_tree(server: subprocess.Popen[bytes], shared: set[Path]) -> None:
    """Kills the server's session and then its other descendants, also stopped ones; returns when all have ended.

    It then removes the processes' files in shared memory, including `shared`.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shared = shared | shared_memory(descendants(os.getpid()))
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS raises the latter for a session of zombies
        pass
    server.wait()
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for process in descendants(os.getpid()):
                    os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
        except ProcessLookupError:
            pass
        except ChildProcessError:
            break
    for path in shared:
        path.unlink(missing_ok=True)


def descendants(process: int) -> list[int]:
    """Returns the process ids of all descendants on Linux, and none on other systems."""
    found: list[int] = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):  # each thread has its own children
        try:
            found += map(int, children.read_text().split())
        except OSError:  # the process has ended meanwhile
            continue
    return found + [grandchild for child in found for grandchild in descendants(child)]


def shared_memory(processes: list[int]) -> set[Path]:
    """Returns the files in shared memory that these processes would leave if they were killed."""
    found: set[Path] = set()
    for process in processes:
        try:
            maps = Path(f"/proc/{process}/maps").read_text()
        except OSError:
            continue
        found |= {Path(line.split()[-1]) for line in maps.splitlines() if SHARED_MEMORY.search(line)}
    return found


def serve(flags: list[str]) -> None:
    """Runs the server in this process. Exits with status 2 for a wrong flag."""
    keys = json.loads(sys.stdin.readline())
    listen_on_one_address()
    if is_cpu():
        install_stand_ins()
    from sglang.srt.server_args import ServerArgs, prepare_server_args

    parser = OneLineParser(prog="SGLang", allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    arguments = split_lists(flags, parser)
    parser.parse_args(arguments)
    internal_key = secrets.token_urlsafe(32)
    guard(internal_key, keys["api_key"], keys["admin_key"])
    from sglang.launch_server import run_server

    run_server(prepare_server_args([*arguments, f"--api-key={internal_key}"]))


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def split_lists(flags: list[str], parser: OneLineParser) -> list[str]:
    """Splits `--name=1 2 3` into four arguments if the flag takes several values. Unknown flags end this process."""
    known = {name: action for action in parser._actions for name in action.option_strings}
    arguments: list[str] = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            parser.error(f"unknown flag {name}" + (f"; did you mean {close[0]}?" if close else ""))
        if equals and known[name].nargs in ("+", "*"):
            arguments += [name, *value.split()]
        else:
            arguments.append(flag)
    return arguments


def guard(internal_key: str, api_key: str, admin_key: str) -> None:
    """Makes the server require these keys, which its arguments do not contain.

    SGLang writes its arguments to the log, and shows them to everyone who may generate. It gets `internal_key` instead,
    which gives access only to the one harmless endpoint that SGLang calls itself. If this change fails, no key is
    accepted.
    """
    if importlib.util.find_spec("sglang.srt.utils.auth") is None:
        print("SGLang: this release has no admin key; install sglang>=0.5.20", file=sys.stderr, flush=True)
        sys.exit(1)
    from sglang.srt.utils import auth

    original: Callable[..., Any] = auth.decide_request_auth

    @functools.wraps(original)
    def decide(*, path: str, **request: Any) -> Any:
        admin = internal_key if path == "/freeze_gc" else admin_key
        return original(**request | {"path": path, "api_key": api_key, "admin_api_key": admin})

    auth.decide_request_auth = decide


def route(flags: list[str]) -> None:
    """Runs sglang-router in this process, without the parts of SGLang that its own start imports."""
    keys = json.loads(sys.stdin.readline())
    if importlib.util.find_spec("sglang_router") is None:
        print("SGLang: sglang_router is missing; pip install sglang-router==0.3.2", file=sys.stderr, flush=True)
        sys.exit(2)
    router_args = importlib.import_module("sglang_router.router_args").RouterArgs
    parser = OneLineParser(prog="SGLang", allow_abbrev=False)
    router_args.add_cli_args(parser, use_router_prefix=False)
    arguments = router_args.from_cli_args(parser.parse_args(flags), use_router_prefix=False)
    arguments.api_key = keys["api_key"]
    arguments.prometheus_port = None  # its metrics would be public, on one port for all routers of the machine
    importlib.import_module("sglang_router.router").Router.from_args(arguments).start()


def listen_on_one_address() -> None:
    """Makes stores of torch.distributed listen on their given address; torch's own listen on all addresses.

    The ranks of a server meet in such a store, even a single rank. The function runs in each process of the server.
    """
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    original: Callable[..., Any] = rendezvous.TCPStore

    def bound(host_name: str, port: int, *arguments: Any, is_master: bool = False, **options: Any) -> Any:
        if is_master and "master_listen_fd" not in options:
            family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
            options["master_listen_fd"] = socket.create_server((host_name, port), family=family).detach()
        return original(host_name, port, *arguments, is_master=is_master, **options)

    rendezvous.TCPStore = bound


def is_cpu() -> bool:
    return os.environ.get("SGLANG_USE_CPU_ENGINE") == "1"


def install_stand_ins() -> None:
    """Replaces SGLang's kernels, and torchvision's operators if its build does not fit this torch.

    It must run before SGLang is imported.
    """
    import torch

    if importlib.util.find_spec("sgl_kernel") is None:
        sys.modules["sgl_kernel"] = kernels()
        operators = torch.library.Library("sgl_kernel", "FRAGMENT")
        operators.define("murmur_hash32_cpu(Tensor seeds, Tensor positions, Tensor columns) -> Tensor")
        operators.impl("murmur_hash32_cpu", seeds().murmur_hash, "CPU")
        LIBRARIES.append(operators)
    try:
        importlib.import_module("torchvision")  # text models need only its transforms
    except RuntimeError:  # operator torchvision::nms does not exist: the build for CUDA cannot be loaded
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        schemas = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        LIBRARIES.append(schemas)


def kernels() -> types.ModuleType:
    """Makes a module that has every name. One kernel is implemented here in torch; the others raise when called."""
    module = types.ModuleType("sgl_kernel")
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def kernel(*_arguments: Any, **_options: Any) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} has no version for this CPU")

        setattr(module, name, kernel)
        return kernel

    module.__dict__.update(
        __version__="0.0.0", __getattr__=missing, assign_req_to_token_pool_cpu=assign_req_to_token_pool
    )
    return module


def assign_req_to_token_pool(
    req_pool_indices: Any,  # [N]
    req_to_token: Any,  # [requests, positions], written
    start_offset: Any,  # [N]
    end_offset: Any,  # [N]
    out_cache_loc: Any,  # [sum of end - start]
    _pool_size: int,
) -> None:
    """Writes the cache slots of N requests' new tokens, which are consecutive in `out_cache_loc`."""
    read = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        req_to_token[row, start:end] = out_cache_loc[read : read + end - start].to(req_to_token.dtype)
        read += end - start


def seeds() -> types.ModuleType:
    """Loads the file seeds.py beside this one, because the folder is not on the module path."""
    spec = importlib.util.spec_from_file_location("megatron_oreal_seeds", Path(__file__).with_name("seeds.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__mp_main__":
    listen_on_one_address()
    if is_cpu():
        install_stand_ins()
        seeds().honour_seeds()

if __name__ == "__main__":
    if sys.argv[1:3] == [SERVE, ROUTER]:
        route(sys.argv[3:])
    elif sys.argv[1:2] == [SERVE]:
        serve(sys.argv[2:])
    else:
        sys.exit(supervise(sys.argv[1:]))
