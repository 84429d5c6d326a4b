"""Sends weights by broadcast: with NCCL between GPUs, and with gloo between CPUs.

Each sending rank has a process group with all tensor-parallel ranks of its servers, in which it is rank 0. The group is
separate from torch.distributed's default group. It lives until a push fails or one of its servers is forgotten.

A server that waits in a broadcast answers no other request. With gloo, the wait ends when any member leaves the group.
With NCCL it may never end, and then the server must be restarted.
"""

from __future__ import annotations

import ipaddress
import secrets
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
from megatron_oreal.parallel.rendezvous import listening_store

CPU_BUCKET_BYTES = 32 * 2**20  # a bucket of this size stays in the CPU cache until the server loads it


class DistributedTransport(ServerTransport):
    def __init__(
        self,
        loop: EventLoopThread,
        timeout_seconds: float,
        bucket_bytes: int,
        device: torch.device,
        check_weights: bool = False,
    ) -> None:
        """`device`: the device of the stream's tensors. A push uses twice `bucket_bytes` of its memory."""
        super().__init__(loop, timeout_seconds, check_weights)
        self.device = device
        self.bucket_bytes = bucket_bytes if device.type == "cuda" else min(bucket_bytes, CPU_BUCKET_BYTES)
        self.buffers = TwoBuffers(self.bucket_bytes)
        self.group: BroadcastGroup | None = None
        self.leaving: list[threading.Thread] = []  # threads that end groups

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
        """Fills the next bucket during the broadcast of one bucket, while the servers load the one before."""
        broadcasting: Collective[None] | None = None
        loading: Requests | None = None
        for bucket in buckets(tensors, self.bucket_bytes, self.buffers):
            if broadcasting is not None:
                broadcasting.result(deadline)
                if loading is not None:
                    loading.answers()
                # The next bucket cannot arrive first, because the servers have taken part in this broadcast.
                loading = broadcasting.requests
            body = {
                **bucket.description(),
                "group_name": group.name,
                "load_format": "flattened_bucket",
                "flush_cache": bucket.is_last,
                # The servers must not take an incomplete push for a complete one.
                "weight_version": self.label(version) if bucket.is_last else None,
            }
            requests = self.post("/update_weights_from_distributed", dict.fromkeys(group.clients, body), deadline)
            broadcasting = Collective(partial(group.broadcast, bucket.flat, deadline), requests)
        if broadcasting is not None:
            broadcasting.result(deadline)
            if loading is not None:
                loading.answers()
            broadcasting.requests.answers()
        if self.device.type == "cuda":
            self.buffers.buffers.clear()

    def open_group(self, clients: Sequence[SglangClient], deadline: Deadline) -> BroadcastGroup:
        if self.group is not None and self.group.clients == tuple(clients):
            return self.group
        self.close_group()
        group = self.group = BroadcastGroup(clients, self.device, deadline)
        group.join_requests = self.post("/init_weights_update_group", group.join_bodies(), deadline)
        Collective(partial(group.join, deadline), group.join_requests).result(deadline)
        group.join_requests.answers()
        return group

    def close_group(self) -> None:
        if self.group is not None:
            body = {"group_name": self.group.name}
            leave_requests = self.post(
                "/destroy_weights_update_group", dict.fromkeys(self.group.clients, body), Deadline(CLEAN_UP_SECONDS)
            )
            self.leaving = [thread for thread in self.leaving if thread.is_alive()]
            self.leaving.append(self.group.end(leave_requests))
            self.group = None

    def forget(self, client: SglangClient) -> None:
        super().forget(client)
        if self.group is not None and client in self.group.clients:
            self.close_group()

    def close(self) -> None:
        self.close_group()
        for thread in self.leaving:
            thread.join(CLEAN_UP_SECONDS)


class BroadcastGroup:
    """A process group of this rank and its servers. First the servers are asked to join, then this rank joins."""

    def __init__(self, clients: Sequence[SglangClient], device: torch.device, deadline: Deadline) -> None:
        self.clients, self.device = tuple(clients), device
        # A killed trainer leaves its groups in the servers, so each group gets a unique name.
        self.name = f"weights-{secrets.token_hex(8)}"
        self.world_size = 1 + sum(client.endpoint.tensor for client in clients)
        self.address = address_for(clients)
        timeout = timedelta(seconds=deadline.left())
        listening = listening_store(self.address, 0, self.world_size, timeout)
        self.port: int = listening.port
        self.store: dist.Store | None = listening
        # Closing `store` ends the waits on all other connections, here and in the servers.
        self.connection: dist.Store = dist.TCPStore(self.address, self.port, self.world_size, timeout=timeout)
        self.join_requests: Requests | None = None
        self.backend: Any = None  # torch.distributed's backend, without a ProcessGroup around it

    def join_bodies(self) -> dict[SglangClient, dict[str, Any]]:
        """Returns the bodies of the requests /init_weights_update_group, which make the servers join."""
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
        """Joins the group and returns when all members have joined. With NCCL, they join in the first broadcast."""
        timeout = timedelta(seconds=deadline.left())
        store = self.connection
        # torch.distributed and SGLang add these prefixes to the keys.
        for prefix in (self.name, f"{self.name}/", "cuda/" if self.device.type == "cuda" else "cpu/"):
            store = dist.PrefixStore(prefix, store)
        if self.device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self.backend = dist.ProcessGroupNCCL(store, 0, self.world_size, options)
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = timeout
            # Listens on this address only, not on all interfaces
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=self.address)]
            self.backend = dist.ProcessGroupGloo(store, 0, self.world_size, gloo)

    def broadcast(self, flat: Tensor, deadline: Deadline) -> None:
        """Sends the tensor to all members, and returns when they have it."""
        assert self.backend is not None
        options = dist.distributed_c10d.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=deadline.left())
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread starts with device 0
        self.backend.broadcast([flat], options).wait()
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def end(self, leave_requests: Requests) -> threading.Thread:
        """Ends this rank's part of the group in a thread, because gloo first waits for a running broadcast.

        `leave_requests` make the servers leave; the broadcast ends when one member leaves.
        """
        held = [self.store, self.backend]
        self.store = self.backend = None
        thread = threading.Thread(
            target=leave_group, args=(held, self.join_requests, leave_requests), name="weight-sync-end", daemon=True
        )
        thread.start()
        return thread


def leave_group(held: list[Any], join_requests: Requests | None, leave_requests: Requests) -> None:
    """Empties `held`, a store and a backend, because each of them ends when its last reference is dropped."""
    if join_requests is not None:
        # A server that has not found the store yet would search for half an hour, so it must find the store first.
        wait(join_requests.futures.values(), CLEAN_UP_SECONDS)
    backend = held.pop()
    held.clear()
    if backend is not None:
        backend.abort()  # does nothing with gloo
    del backend
    wait(leave_requests.futures.values(), CLEAN_UP_SECONDS)


class TwoBuffers:
    """Returns two buffers alternately: one is filled while the other one is broadcast."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.buffers: deque[Tensor] = deque()  # the buffer that was returned longest ago is first

    def __call__(self, num_bytes: int, device: torch.device) -> Tensor:
        if num_bytes > self.num_bytes:  # for a tensor that is larger than a bucket
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if len(self.buffers) < 2:
            buffer = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
        else:
            buffer = self.buffers.popleft()
        self.buffers.append(buffer)
        return buffer[:num_bytes]


def address_for(clients: Sequence[SglangClient]) -> str:
    """Returns this node's address on the interface to the servers; loopback if all of them are on this node."""
    found = "127.0.0.1"
    for client in clients:
        found = address_towards(str(urlsplit(client.endpoint.url).hostname))
        if not ipaddress.ip_address(found).is_loopback:
            break
    return found
