"""Frees and restores the device memory of a model, for generation servers that share the device.

Storages are emptied and filled in place, so every tensor, view and buffer that Megatron holds stays the same object.
Weights, optimizer state and float32 masters move to the host. Gradients are dropped, because each update begins with
zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class DeviceMemory:
    """The storages of one model. Calls of `offload` and `restore` alternate."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}  # identity -> storage, its bytes on the host
        self.dropped: list[tuple[torch.UntypedStorage, int]] = []
        self.is_offloaded = False

    def offload(self, kept: Iterable[Tensor], dropped: Iterable[Tensor]) -> int:
        """Frees the storages; returns their bytes. `kept` are restored with their values, `dropped` with zeros."""
        assert not self.is_offloaded, "the model is on the host already"
        drops = storages(dropped)
        keeps = {key: storage for key, storage in storages(kept).items() if key not in drops}
        # A host copy is pinned once and reused, because pinning takes longer than copying.
        hosts = {key: host for key, (_, host) in self.kept.items() if key in keeps}
        self.kept = {}
        for key, storage in keeps.items():
            host = hosts.get(key)
            if host is None or host.numel() != storage.nbytes():
                host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
            host.copy_(as_bytes(storage), non_blocking=True)
            self.kept[key] = storage, host
        self.dropped = [(storage, storage.nbytes()) for storage in drops.values()]
        wait(keeps.values())
        num_bytes = 0
        for storage in (*keeps.values(), *drops.values()):
            num_bytes += storage.nbytes()
            storage.resize_(0)
        give_back_memory(keeps.values())
        self.is_offloaded = True
        return num_bytes

    def restore(self) -> None:
        assert self.is_offloaded, "the model is on its device already"
        for storage, host in self.kept.values():
            storage.resize_(host.numel())
            as_bytes(storage).copy_(host, non_blocking=True)
        for storage, num_bytes in self.dropped:
            storage.resize_(num_bytes)
            as_bytes(storage).zero_()
        wait(storage for storage, _ in self.kept.values())
        self.is_offloaded = False


def storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """Returns the distinct, non-empty storages of the tensors."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage._cdata] = storage
    return found


def as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def give_back_memory(freed: Iterable[torch.UntypedStorage]) -> None:
    """Returns torch's cached memory, CUDA IPC's included, to the driver, so that other processes can use it."""
    if any(storage.device.type == "cuda" for storage in freed):
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()


def wait(moved: Iterable[torch.UntypedStorage]) -> None:
    for device in {storage.device for storage in moved if storage.device.type == "cuda"}:
        torch.cuda.synchronize(device)
