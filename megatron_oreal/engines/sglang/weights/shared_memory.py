"""Shares weights with servers on the trainer's own GPUs. Only CUDA IPC handles are sent; the bytes are not copied.

Each tensor-parallel rank of a server gets the handle of a buffer on its GPU, which the trainer rank on this GPU makes.
On a CPU the buffers are files in shared memory, and any rank can make them. A process of torch manages these files, and
lives until the servers that have opened one of them have ended.

SGLang reads the handles with an unpickler that allows few names. Among them are torch's functions that open handles,
and types.SimpleNamespace, which replaces SGLang's own FlattenedTensorMetadata here.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy, reductions, set_sharing_strategy

from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.weights.buckets import Bucket, buckets
from megatron_oreal.engines.sglang.weights.requests import Deadline, Requests, WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import ServerTransport
from megatron_oreal.parallel.collectives import all_gather_object

DEVICE = 6  # index of the device in the arguments of torch's rebuild_cuda_tensor
Receiver = tuple[str, int]  # a server's URL and one of its tensor-parallel ranks, e.g. ("http://127.0.0.1:31000", 0)
RanksOf = Callable[[SglangClient], Sequence[int]]


class TensorTransport(ServerTransport):
    def __init__(
        self,
        loop: EventLoopThread,
        timeout_seconds: float,
        bucket_bytes: int,
        ranks_of: RanksOf,
        check_weights: bool = False,
    ) -> None:
        """`ranks_of`: for each tensor-parallel rank of a server, the trainer's rank on the same GPU."""
        super().__init__(loop, timeout_seconds, check_weights)
        self.bucket_bytes, self.ranks_of = bucket_bytes, ranks_of

    def send(
        self, tensors: Iterator[tuple[str, Tensor]], version: int, clients: Sequence[SglangClient], deadline: Deadline
    ) -> None:
        """Offers all buckets, even after a failure, because every rank takes part in the exchange of the handles."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        wanted = {
            (client.endpoint.url, number): trainer_rank % world_size  # on a CPU there may be more servers than ranks
            for client in clients
            for number, trainer_rank in enumerate(self.ranks_of(client))
        }
        mine = [receiver for each in all_gather_object(wanted) for receiver, owner in each.items() if owner == rank]
        failure: WeightSyncError | None = None
        under_way: tuple[Requests, Bucket] | None = None  # the bucket's memory must live until its requests end
        try:
            self.begin(clients, deadline)
        except WeightSyncError as error:
            failure = error
        for bucket in buckets(tensors, self.bucket_bytes, shared_memory, copies_all=True):
            offered = all_gather_object({receiver: serialised(bucket) for receiver in mine})
            handles = {receiver: handle for each in offered for receiver, handle in each.items()}
            try:
                if failure is None and under_way is not None:
                    under_way[0].answers()
                if failure is None:
                    under_way = self.offer(bucket, handles, version, clients, deadline), bucket
            except WeightSyncError as error:
                failure = error
        if failure is not None:
            raise failure
        if under_way is not None:
            under_way[0].answers()
        self.end(clients, deadline)

    def offer(
        self,
        bucket: Bucket,
        handles: dict[Receiver, str],
        version: int,
        clients: Sequence[SglangClient],
        deadline: Deadline,
    ) -> Requests:
        bodies = {
            client: {
                "serialized_named_tensors": [
                    handles[client.endpoint.url, number] for number in range(client.endpoint.tensor)
                ],
                "load_format": "flattened_bucket",
                "flush_cache": bucket.is_last,
                # The servers must not take an incomplete push for a complete one.
                "weight_version": self.label(version) if bucket.is_last else None,
            }
            for client in clients
        }
        return self.post("/update_weights_from_tensor", bodies, deadline)


def shared_memory(num_bytes: int, device: torch.device) -> Tensor:
    """Allocates new memory for a bucket. torch frees it when the server has closed its handle."""
    if device.type == "cuda":
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    storage = torch.UntypedStorage._new_using_filename_cpu(num_bytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]


class Handle:
    """An object whose pickle is a call that opens the tensor's memory in another process."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        opens, arguments = reductions.reduce_tensor(self.tensor)
        if self.tensor.is_cuda:
            # The server numbers its GPUs differently, so SGLang's version of the function uses the GPU's UUID.
            name = str(torch.cuda.get_device_properties(arguments[DEVICE]).uuid)
            arguments = (*arguments[:DEVICE], name, *arguments[DEVICE + 1 :])
        return opens, arguments


def serialised(bucket: Bucket) -> str:
    """Returns a bucket for one receiver, which must open it exactly once, in SGLang's format flattened_bucket."""
    metadata, start = [], 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        num_bytes = shape.numel() * dtype.itemsize
        end = start + num_bytes
        metadata.append(
            SimpleNamespace(name=name, shape=shape, dtype=dtype, start_idx=start, end_idx=end, numel=num_bytes)
        )
        start = end
    pickled, strategy = io.BytesIO(), get_sharing_strategy()
    # torch's other strategy passes file descriptors to child processes, but servers are not children of this process.
    set_sharing_strategy("file_system")
    try:
        ForkingPickler(pickled).dump({"flattened_tensor": Handle(bucket.flat), "metadata": metadata})
    finally:
        set_sharing_strategy(strategy)
    return base64.b64encode(pickled.getvalue()).decode()
