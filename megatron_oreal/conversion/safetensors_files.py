"""Makes safetensors files that several processes can fill at once, because each tensor's place is planned before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_oreal.weights.hf_directory import INDEX, SAFETENSORS_DTYPES, WEIGHTS

# Only the writer supports quantised tensors. The reader refuses them, because it would lose their scales.
DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()} | {torch.float8_e4m3fn: "F8_E4M3"}


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a tensor's bytes in the files."""

    file: str
    begin: int  # in the file
    shape: tuple[int, ...]
    dtype: torch.dtype


def create_files(
    directory: Path, tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype]], file_bytes: int
) -> dict[str, Slot]:
    """Makes files of at most `file_bytes`, with headers and index but without the tensors' bytes.

    A larger tensor gets a file of its own.
    """
    groups: list[list[tuple[str, tuple[int, ...], torch.dtype]]] = [[]]
    filled = total = 0
    for name, shape, dtype in tensors:
        size = torch.Size(shape).numel() * dtype.itemsize
        if groups[-1] and filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape, dtype))
        filled, total = filled + size, total + size
    slots: dict[str, Slot] = {}
    for number, group in enumerate(groups):
        name = WEIGHTS if len(groups) == 1 else f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        slots |= create_file(directory / name, group)
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: slot.file for name, slot in slots.items()}}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
    return slots


def create_file(path: Path, tensors: list[tuple[str, tuple[int, ...], torch.dtype]]) -> dict[str, Slot]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends: dict[str, int] = {}
    end = 0
    for name, shape, dtype in tensors:
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        ends[name] = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that tensors begin at multiples of 8 bytes
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    start = 8 + len(encoded)
    return {
        name: Slot(path.name, start + ends[name] - torch.Size(shape).numel() * dtype.itemsize, shape, dtype)
        for name, shape, dtype in tensors
    }


def fill(directory: Path, slot: Slot, tensor: Tensor) -> None:
    """Writes a tensor's bytes into its place."""
    assert tuple(tensor.shape) == slot.shape and tensor.dtype == slot.dtype
    content = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    descriptor = os.open(directory / slot.file, os.O_WRONLY)
    try:
        written = 0
        while written < len(content):
            written += os.pwrite(descriptor, content[written:], slot.begin + written)
    finally:
        os.close(descriptor)
