"""Groups the tensors of a weight stream into buckets of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(slots=True)
class Bucket:
    """Tensors that are sent together, in the format that SGLang calls `flattened_bucket`."""

    flat: Tensor  # uint8: the tensors' bytes, one after the other
    names: list[str]
    dtypes: list[torch.dtype]
    shapes: list[torch.Size]
    is_last: bool

    def description(self) -> dict[str, list[Any]]:
        return {
            "names": self.names,
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in self.dtypes],
            "shapes": [list(shape) for shape in self.shapes],
        }


Allocate = Callable[[int, torch.device], Tensor]  # (bytes, device) -> uint8


def buckets(
    stream: Iterable[tuple[str, Tensor]], num_bytes: int, allocate: Allocate, copies_all: bool = False
) -> Iterator[Bucket]:
    """Yields buckets of at most `num_bytes`; a larger tensor gets a bucket of its own.

    The buffer of a bucket is allocated when the consumer asks for the bucket, so `allocate` may hand out two buffers in
    turn. The only tensor of a bucket is not copied, unless `copies_all`.
    """
    waiting: list[tuple[str, Tensor]] = []
    filled = 0
    for name, tensor in stream:
        # SGLang reads a tensor in place: it must begin at a multiple of its element's size.
        if waiting and (filled + tensor.nbytes > num_bytes or filled % tensor.itemsize):
            yield flattened(waiting, allocate, copies_all, is_last=False)
            waiting, filled = [], 0
        waiting.append((name, tensor))
        filled += tensor.nbytes
    if waiting:
        yield flattened(waiting, allocate, copies_all, is_last=True)


def flattened(tensors: Sequence[tuple[str, Tensor]], allocate: Allocate, copies_all: bool, is_last: bool) -> Bucket:
    names, dtypes, shapes = zip(*((name, tensor.dtype, tensor.shape) for name, tensor in tensors), strict=True)
    first = tensors[0][1]
    if len(tensors) == 1 and not copies_all:
        flat = first.detach().contiguous().view(-1).view(torch.uint8)
    else:
        flat = allocate(sum(tensor.nbytes for _, tensor in tensors), first.device)
        offset = 0
        for _, tensor in tensors:
            flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
            offset += tensor.nbytes
    return Bucket(flat, list(names), list(dtypes), list(shapes), is_last)
