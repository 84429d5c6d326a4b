"""Checks the host's memory, its shared memory, the limits of processes, and the remains of earlier runs."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.doctor.findings import Finding, error, ok, warning

GIB = 2**30
SHM = Path("/dev/shm")
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
INFINIBAND = Path("/sys/class/infiniband")
MIN_FILES = 4096  # file descriptors; each connection of a rollout uses one
MIN_SHM_BYTES = GIB  # NCCL and data workers fail with a container's default of 64 MiB
MIN_RANK_BYTES = 2 * GIB  # of host memory that each process needs for torch and its libraries
UNLIMITED = resource.RLIM_INFINITY


@dataclass(frozen=True, slots=True)
class HostFacts:
    available_bytes: int | None  # of memory; None if the system does not report it
    limit_bytes: int | None  # of the container or the job; None: no limit
    shm_free_bytes: int | None  # None: no /dev/shm
    max_files: int  # file descriptors of a process
    max_locked_bytes: int  # of memory that a process may pin; UNLIMITED means no limit
    has_infiniband: bool
    num_local_ranks: int
    num_gpus: int
    num_cores: int


def read_host(num_gpus: int) -> HostFacts:
    status = os.statvfs(SHM) if SHM.is_dir() else None
    return HostFacts(
        available_bytes=read_available(),
        limit_bytes=read_limit(),
        shm_free_bytes=status.f_bavail * status.f_frsize if status else None,
        max_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        max_locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        has_infiniband=INFINIBAND.is_dir() and any(INFINIBAND.iterdir()),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_gpus=num_gpus,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    )


def read_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # The system is not Linux.
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def read_limit() -> int | None:
    for file in CGROUP_LIMITS:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < 2**60:  # an extremely large number means no limit
            return int(text)
    return None


def check_host(facts: HostFacts) -> Iterator[Finding]:
    yield from check_memory(facts)
    yield from check_shm(facts)
    yield from check_limits(facts)


def check_memory(facts: HostFacts) -> Iterator[Finding]:
    sizes = [size for size in (facts.available_bytes, facts.limit_bytes) if size is not None]
    if not sizes:
        yield ok("host memory", "the system does not say how much there is")
        return
    usable, needed = min(sizes), facts.num_local_ranks * MIN_RANK_BYTES
    words = f"{usable / GIB:.1f} GiB for {facts.num_local_ranks} process{'es' * (facts.num_local_ranks > 1)}"
    if usable < needed / 4:
        yield error("host memory", words, "ask for more (--mem=0 takes all of a node)")
    elif usable < needed:
        yield warning("host memory", f"only {words}", "ask for more (--mem=0 takes all of a node)")
    else:
        yield ok("host memory", f"{words}, {facts.num_cores} cores")


def check_shm(facts: HostFacts) -> Iterator[Finding]:
    fix = "start the container with --ipc=host, or --shm-size=16g; remove what ended runs have left in /dev/shm"
    if facts.shm_free_bytes is None:
        yield warning("shared memory", "there is no /dev/shm", "mount one, or keep to one process")
        return
    words = f"/dev/shm has {facts.shm_free_bytes / 2**20:.0f} MiB free"
    needs_it = min(facts.num_local_ranks, facts.num_gpus) > 1  # NCCL needs it between the GPUs of a host
    if facts.shm_free_bytes >= MIN_SHM_BYTES:
        yield ok("shared memory", words)
    elif needs_it and facts.shm_free_bytes <= 64 * 2**20:
        yield error("shared memory", f"{words}, too little for NCCL", fix)
    else:
        yield warning("shared memory", f"only {words}", fix)


def check_limits(facts: HostFacts) -> Iterator[Finding]:
    is_fine = True
    if facts.max_files != UNLIMITED and facts.max_files < MIN_FILES:
        is_fine = False
        fix = f"ulimit -n {MIN_FILES}, or --ulimit nofile={MIN_FILES} for a container"
        yield warning("limits", f"a process may open {facts.max_files} files", fix)
    if facts.has_infiniband and facts.max_locked_bytes != UNLIMITED:
        is_fine = False
        fix = "ulimit -l unlimited; under Slurm PropagateResourceLimitsExcept=MEMLOCK; container: --ulimit memlock=-1"
        yield error("limits", f"a process may lock {facts.max_locked_bytes / 2**10:.0f} KiB: InfiniBand fails", fix)
    if is_fine:
        yield ok("limits", f"{facts.max_files} open files a process; memory may be locked as far as it is needed")
