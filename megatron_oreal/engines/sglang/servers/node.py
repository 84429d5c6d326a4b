"""Finds the resources that a server needs on its node: a port, an address and GPUs."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_oreal.config import SglangConfig

NUM_FOLDERS = 10  # tried names of lock folders
MAX_USED_SHARE = 0.2  # of a GPU's memory that other processes may use
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits")


@contextmanager
def held_port(host: str, ports: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yields a free port and a file descriptor that reserves it; a process that inherits it keeps the port.

    Runs on this node coordinate by locked files; another program may still take the port. Raises ValueError if no port
    of the range (both ends included) is free, or if `host` is not an address of this node.
    """
    folder = lock_folder()
    for port in range(ports[0], ports[1] + 1):
        try:
            descriptor = os.open(folder / f"port-{port}.lock", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError:  # a file of another user has the name, so the port counts as taken
            continue
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if is_free(host, port):
                yield port, descriptor
                return
        finally:
            os.close(descriptor)
    raise ValueError(
        f"rollout.sglang.ports: no port of {ports[0]} to {ports[1]} is free on {host}; name another range, or end the "
        "servers that are there"
    )


def address_towards(host: str) -> str:
    """Returns this node's address on the interface that leads to `host`."""
    family, kind, protocol, _, where = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(where)  # this sends nothing
        address: str = probe.getsockname()[0]
    return address


def lock_folder() -> Path:
    """Returns this user's folder for locks, which no other user can read or write.

    Another user may have made a folder with the known name; then the next name is used.
    """
    name = f"megatron-oreal-{os.getuid()}"
    session, shared = os.environ.get("XDG_RUNTIME_DIR"), Path(tempfile.gettempdir())
    folders = [Path(session) / "megatron-oreal"] if session else []
    folders += [shared / name, *(shared / f"{name}-{number}" for number in range(1, NUM_FOLDERS))]
    for folder in folders:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            status = folder.lstat()
        except OSError:
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return folder
    return Path(tempfile.mkdtemp(prefix=f"{name}-"))


def is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the server sets this option too
            probe.bind(address)
            probe.listen(1)
    except socket.gaierror as error:
        raise ValueError(f"rollout.sglang.host: {host!r} is no address ({error.strerror})") from None
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise ValueError(f"rollout.sglang.host: {host} is no address of this node; name one of its own") from None
        return False
    return True


def assign_gpus(config: SglangConfig, num_trainer_gpus: int, visible: Sequence[str]) -> list[list[str]]:
    """Returns the GPUs of each server, as CUDA_VISIBLE_DEVICES names them, e.g. [["2", "3"], ["4", "5"]].

    `visible`: all GPUs that this run may use on the node; the trainer's processes use the first `num_trainer_gpus`.
    Raises ValueError if there are too few.
    """
    needed = config.num_servers * config.tensor
    taken = range(num_trainer_gpus)
    is_colocated = config.placement == "colocated"
    chosen = config.gpus or [number for number in range(len(visible)) if (number in taken) == is_colocated]
    if any(not 0 <= gpu < len(visible) for gpu in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"rollout.sglang.gpus={chosen} must be different numbers below {len(visible)}, the GPUs of this node"
        )
    if len(chosen) < needed:
        where = "of the trainer" if is_colocated else "beside the trainer's" if not config.gpus else "named"
        raise ValueError(
            f"rollout.sglang: num_servers={config.num_servers} x tensor={config.tensor} need {needed} GPUs, "
            f"{len(chosen)} are {where} (this node has {len(visible)}): start fewer servers, or name gpus"
        )
    if not is_colocated and (both := sorted({*chosen[:needed]} & {*taken})):
        raise ValueError(
            f"rollout.sglang.gpus: the trainer itself has GPU {both[0]}; name others, or set placement=colocated"
        )
    if is_colocated and (foreign := sorted({*chosen[:needed]} - {*taken})):
        raise ValueError(
            f"rollout.sglang.gpus: GPU {foreign[0]} is not the trainer's; name those of its {num_trainer_gpus} "
            "processes, or set placement=disaggregated"
        )
    return [
        [visible[gpu] for gpu in chosen[first : first + config.tensor]] for first in range(0, needed, config.tensor)
    ]


def check_gpus_are_free(gpus: Sequence[str]) -> None:
    """Raises ValueError for a GPU whose memory other processes use. Does nothing without nvidia-smi."""
    for gpu in gpus:
        try:
            answer = subprocess.run(
                [*NVIDIA_SMI, f"--id={gpu}"], capture_output=True, text=True, timeout=60, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return
        used, total = map(float, answer.stdout.split(","))
        if used > MAX_USED_SHARE * total:
            raise ValueError(
                f"rollout.sglang.gpus: GPU {gpu} is taken ({used / 1024:.0f} of {total / 1024:.0f} GiB in use); "
                "end what runs there, or name others"
            )
