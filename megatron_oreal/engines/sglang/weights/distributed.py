"""Weights by broadcast: NCCL between GPUs, gloo between CPUs.

Each sending rank has a process group with all tensor-parallel ranks of its servers, in which it is rank 0. The group
is apart from torch.distributed's own and lives until one of its servers is forgotten or a push fails.

A server that waits in a broadcast answers nothing else. With gloo it returns when our part of the group has ended, or
another member's; with NCCL it may not return at all and has to be started again.
"""

from __future__ import annotations

import ipaddress
import secrets
import socket
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import wait
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.servers.node import address_towards
from megatron_oreal.engines.sglang.weights.buckets import buckets
from megatron_oreal.engines.sglang.weights.requests import CLEAN_UP_SECONDS, Collective, Deadline, Requests
from megatron_oreal.engines.sglang.weights.transport import ServerTransport

CPU_BUCKET_BYTES = 32 * 2**20  # faster than larger ones: it stays in the cache until it is loaded


class DistributedTransport(ServerTransport):
    def __init__(
        self,
        loop: EventLoopThread,
        timeout_seconds: float,
        bucket_bytes: int,
        device: torch.device,
        check_weights: bool = False,
    ) -> None:
        """`device`: of the stream's tensors. Twice `bucket_bytes` of its memory are used during a push."""
        super().__init__(loop, timeout_seconds, check_weights)
        self.device = device
        self.bucket_bytes = bucket_bytes if device.type == "cuda" else min(bucket_bytes, CPU_BUCKET_BYTES)
        self.buffers = TwoBuffers(self.bucket_bytes)
        self.group: BroadcastGroup | None = None
        self.endings: list[threading.Thread] = []

    def send(
        self, tensors: Iterator[tuple[str, Tensor]], version: int, clients: Sequence[SglangClient], deadline: Deadline
    ) -> None:
        if not clients:
            return
        try:
            group = self.open_group(clients, deadline)
            self.begin(clients, deadline)
            self.send_buckets(group, tensors, version, deadline)
            self.end(clients, deadline)
        except BaseException:
            self.close_group()
            raise

    def send_buckets(
        self, group: BroadcastGroup, tensors: Iterator[tuple[str, Tensor]], version: int, deadline: Deadline
    ) -> None:
        """While a bucket travels, the next one is filled, and the servers load the one before."""
        travelling: Collective[None] | None = None
        loading: Requests | None = None
        for bucket in buckets(tensors, self.bucket_bytes, self.buffers):
            if travelling is not None:
                travelling.result(deadline)
                if loading is not None:
                    loading.answers()
                # What follows cannot overtake it: the servers have taken part in its broadcast.
                loading = travelling.requests
            body = {
                **bucket.description(),
                "group_name": group.name,
                "load_format": "flattened_bucket",
                "flush_cache": bucket.is_last,
                # An unfinished push must not look like a finished one.
                "weight_version": str(version) if bucket.is_last else None,
            }
            requests = self.post("/update_weights_from_distributed", dict.fromkeys(group.clients, body), deadline)
            travelling = Collective(partial(group.broadcast, bucket.flat, deadline), requests)
        if travelling is not None:
            travelling.result(deadline)
            if loading is not None:
                loading.answers()
            travelling.requests.answers()
        if self.device.type == "cuda":
            self.buffers.buffers.clear()

    def open_group(self, clients: Sequence[SglangClient], deadline: Deadline) -> BroadcastGroup:
        if self.group is not None and self.group.clients == tuple(clients):
            return self.group
        self.close_group()
        group = self.group = BroadcastGroup(clients, self.device, deadline)
        group.invited = self.post("/init_weights_update_group", group.invitations(), deadline)
        Collective(partial(group.join, deadline), group.invited).result(deadline)
        group.invited.answers()
        return group

    def close_group(self) -> None:
        if self.group is not None:
            body = {"group_name": self.group.name}
            farewell = self.post(
                "/destroy_weights_update_group", dict.fromkeys(self.group.clients, body), Deadline(CLEAN_UP_SECONDS)
            )
            self.endings = [thread for thread in self.endings if thread.is_alive()]
            self.endings.append(self.group.end(farewell))
            self.group = None

    def forget(self, client: SglangClient) -> None:
        super().forget(client)
        if self.group is not None and client in self.group.clients:
            self.close_group()

    def close(self) -> None:
        self.close_group()
        for thread in self.endings:
            thread.join(CLEAN_UP_SECONDS)


class BroadcastGroup:
    """A process group of ours with servers: they are invited first, then we join."""

    def __init__(self, clients: Sequence[SglangClient], device: torch.device, deadline: Deadline) -> None:
        self.clients, self.device = tuple(clients), device
        # A trainer that was killed has left groups in the servers: names are never used again.
        self.name = f"weights-{secrets.token_hex(8)}"
        self.world_size = 1 + sum(client.endpoint.tensor for client in clients)
        self.address = address_for(clients)
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        listening = socket.create_server((self.address, 0), family=family, backlog=self.world_size)
        self.port: int = listening.getsockname()[1]
        timeout = timedelta(seconds=deadline.left())
        self.store: dist.Store | None = dist.TCPStore(
            self.address,
            self.port,
            self.world_size,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        # Closing `store` ends what waits by other connections, here and in the servers.
        self.connection: dist.Store = dist.TCPStore(self.address, self.port, self.world_size, timeout=timeout)
        self.invited: Requests | None = None
        self.backend: Any = None  # torch.distributed's backend, without a ProcessGroup around it

    def invitations(self) -> dict[SglangClient, dict[str, Any]]:
        """Of /init_weights_update_group."""
        bodies, rank = {}, 1
        for client in self.clients:
            bodies[client] = {
                "master_address": self.address,
                "master_port": self.port,
                "rank_offset": rank,
                "world_size": self.world_size,
                "group_name": self.name,
                "backend": "nccl" if self.device.type == "cuda" else "gloo",
            }
            rank += client.endpoint.tensor
        return bodies

    def join(self, deadline: Deadline) -> None:
        """Returns when all members have joined (NCCL: they do so in the first broadcast)."""
        timeout = timedelta(seconds=deadline.left())
        store = self.connection
        # The prefixes that torch.distributed and SGLang give the keys.
        for prefix in (self.name, f"{self.name}/", "cuda/" if self.device.type == "cuda" else "cpu/"):
            store = dist.PrefixStore(prefix, store)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.backend = dist.ProcessGroupNCCL(store, 0, self.world_size, options)
        else:
            self.backend = dist.ProcessGroupGloo(store, 0, self.world_size, timeout)

    def broadcast(self, flat: Tensor, deadline: Deadline) -> None:
        """Returns when it is done."""
        assert self.backend is not None
        options = dist.distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=deadline.left())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread begins with device 0
        self.backend.broadcast([flat], options).wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def end(self, farewell: Requests) -> threading.Thread:
        """In a thread: a gloo group with a broadcast under way ends only when that does.

        `farewell` makes the servers leave: the broadcast ends when a member does.
        """
        held = [self.store, self.backend]
        self.store = self.backend = None
        thread = threading.Thread(
            target=abandon, args=(held, self.invited, farewell), name="weight-sync-end", daemon=True
        )
        thread.start()
        return thread


def abandon(held: list[Any], invited: Requests | None, farewell: Requests) -> None:
    """Empties `held`, a store and a backend, which end with their last references."""
    if invited is not None:
        # A server that does not find the store tries for half an hour; one that is waiting at it gives up with it.
        wait(invited.futures.values(), CLEAN_UP_SECONDS)
    backend = held.pop()
    held.clear()
    if backend is not None:
        backend.abort()  # nothing to gloo
    del backend
    wait(farewell.futures.values(), CLEAN_UP_SECONDS)


class TwoBuffers:
    """Memory of buckets, in turn."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.buffers: deque[Tensor] = deque()  # the one used longest ago first

    def __call__(self, num_bytes: int, device: torch.device) -> Tensor:
        if num_bytes > self.num_bytes:  # a large tensor alone
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if len(self.buffers) < 2:
            buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        else:
            buffer = self.buffers.popleft()
        self.buffers.append(buffer)
        return buffer[:num_bytes]


def address_for(clients: Sequence[SglangClient]) -> str:
    """This node's, as the servers see it: of the interface that leads to them; loopback if all are here."""
    found = "127.0.0.1"
    for client in clients:
        found = address_towards(str(urlsplit(client.endpoint.url).hostname))
        if not ipaddress.ip_address(found).is_loopback:
            break
    return found
