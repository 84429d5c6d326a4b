"""Joins the ranks of the job, tries an all-reduce over all of them, and compares their clocks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_oreal.doctor.files import MAX_SKEW_SECONDS, skew
from megatron_oreal.doctor.findings import Finding, error, ok, warning
from megatron_oreal.doctor.network import Link
from megatron_oreal.parallel.collectives import all_gather_object, wait_for_all_ranks
from megatron_oreal.parallel.rendezvous import rendezvous, stay_on_loopback

GPU_BYTES, CPU_BYTES = 64 * 2**20, 4 * 2**20  # the size of the reduced tensor
NUM_TRIES = 3  # the fastest try counts
MIN_SHARE = 0.25  # of the link's expected rate; a lower rate is slow
NUM_CLOCK_TRIES = 3


@dataclass(frozen=True, slots=True)
class AllReduce:
    backend: str
    num_bytes: int
    seconds: float  # of the fastest try
    is_right: bool  # whether the sum is correct
    num_ranks: int

    @property
    def bus_gigabytes_per_second(self) -> float:
        """Returns the rate of each rank's link: 2 (n - 1) / n of the tensor in one direction, as nccl-tests count."""
        return 2 * (self.num_ranks - 1) / self.num_ranks * self.num_bytes / self.seconds / 1e9


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def joined(seconds: float) -> Iterator[None]:
    """Connects the ranks that the launcher has started, as a run does. A single process connects to no other.

    Raises ValueError if the ranks do not find each other.
    """
    if world_size() == 1:
        yield
        return
    timeout = timedelta(seconds=seconds)
    stay_on_loopback()
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} of this host has no GPU of its own; start fewer processes on it")
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout, **rendezvous(timeout))
        wait_for_all_ranks()
    except (RuntimeError, OSError) as raised:
        reason = str(raised).splitlines()[0][:200]
        raise ValueError(
            f"rank {os.environ['RANK']} of {world_size()} did not find the others at {os.environ.get('MASTER_ADDR')} "
            f"port {os.environ.get('MASTER_PORT')} ({reason}); open the ports between the nodes, and export "
            "GLOO_SOCKET_IFNAME where hosts have several interfaces"
        ) from None
    try:
        yield
    finally:
        dist.destroy_process_group()


def measure_all_reduce() -> AllReduce:
    """Collective. Sums ones over all ranks, on the GPUs if there are any."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
    num_bytes = GPU_BYTES if on_cuda else CPU_BYTES
    values = torch.ones(num_bytes // 4, device=device)
    times, is_right = [], True
    for _ in range(NUM_TRIES + 1):  # the first try includes the connection
        values.fill_(1.0)
        wait_for_all_ranks()
        start = time.perf_counter()
        dist.all_reduce(values)
        if on_cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
        is_right &= bool((values == dist.get_world_size()).all())
    slowest = torch.tensor([min(times[1:]), 0.0 if is_right else 1.0], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    backend = "nccl" if on_cuda else "gloo"
    return AllReduce(backend, num_bytes, slowest[0].item(), slowest[1].item() == 0, dist.get_world_size())


def check_all_reduce(found: AllReduce, link: Link) -> Iterator[Finding]:
    """Checks the measured rate. `link`: the link between hosts that a host's ranks share, or that of one GPU.

    Within a host each GPU has its own links. Between hosts NCCL makes a ring for each network card, so that a rank sees
    the rate of all the host's cards.
    """
    name, speed = "all-reduce", found.bus_gigabytes_per_second
    words = f"{found.num_ranks} ranks, {found.backend}, {found.num_bytes / 2**20:.0f} MiB: {speed:.2f} GB/s"
    if not found.is_right:
        yield error(name, f"{words}, and a wrong sum", "drain the node whose GPU or network card is broken")
        return
    if link.gigabytes_per_second is None:
        yield ok(name, f"{words} ({link.name}, whose rate is not known)")
        return
    words += f" of {link.gigabytes_per_second:.1f} GB/s ({link.name})"
    if speed < MIN_SHARE * link.gigabytes_per_second:
        fix = (
            "NCCL_DEBUG=INFO tells which network it takes" if found.backend == "nccl" else "GLOO_SOCKET_IFNAME chooses"
        )
        yield warning(name, f"slow: {words}", f"{fix}; see docs/doctor.md")
    else:
        yield ok(name, words)


def measure_clocks() -> list[tuple[str, float]]:
    """Collective. Returns each host and the lead of its clock over the first rank's, in seconds.

    All ranks read their clocks when they leave a barrier. The smallest difference of several tries counts, because a
    rank that the system delays appears late.
    """
    host, tries = os.uname().nodename, []
    for _ in range(NUM_CLOCK_TRIES):
        wait_for_all_ranks()
        tries.append(all_gather_object((host, time.time())))
    differences: dict[str, float] = {}
    for seen in tries:
        for other, clock in seen:
            ahead = clock - seen[0][1]
            if abs(ahead) < abs(differences.get(other, float("inf"))):
                differences[other] = ahead
    return list(differences.items())


def check_clocks(differences: Sequence[tuple[str, float]]) -> Iterator[Finding]:
    far = [(host, seconds) for host, seconds in differences if abs(seconds) > MAX_SKEW_SECONDS]
    for host, seconds in far:
        yield skew("the host", host, seconds)
    if not far:
        largest = max((abs(seconds) for _, seconds in differences), default=0.0)
        words = (
            f"within {largest:.3f} s on {len(differences)} hosts" if len(differences) > 1 else "one host has one clock"
        )
        yield ok("clocks", words)
