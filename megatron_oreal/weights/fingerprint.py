"""Fingerprints a weight stream by sums of its bits, on the way to the engine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_oreal.weights.stream_filters import Stream


class CountedStream:
    """The stream, once, with its size."""

    def __init__(self, stream: Stream, fingerprints: bool = False) -> None:
        self.tensors, self.fingerprints = iter(stream), fingerprints
        self.num_bytes = 0
        self.hash = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        name, tensor = next(self.tensors)
        self.num_bytes += tensor.nbytes
        if self.fingerprints:
            # The sum of the bit patterns: made where the tensor is.
            bits = tensor.view(BITS[tensor.itemsize]).sum(dtype=torch.int64)
            self.hash.update(f"{name} {bits.item()}\n".encode())
        return name, tensor

    @property
    def fingerprint(self) -> str:
        return self.hash.hexdigest()

    def drain(self) -> None:
        """To its end: the other ranks are in its collectives."""
        for _ in self:
            pass


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
COLUMNS = 1024  # words in a row of the matrix that a tensor's bits are summed in


class Fingerprint:
    """A weight stream that remembers what passed through it; the same for the same values, whoever held which shard.

    Every tensor counts with its name, dtype, shape, the sum of its bits and their sum weighted by position, as int64
    that wrap around: one changed bit always shows.
    """

    def __init__(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        self.stream = stream
        self.names: list[str] = []
        self.sums: list[Tensor] = []  # on the weights' device: nothing waits for it before the end

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.names, self.sums = [], []
        for name, tensor in self.stream:
            self.names.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
            self.sums.append(bit_sums(tensor))
            yield name, tensor

    def digest(self) -> str:
        """Of the last full iteration, as 32 hexadecimal digits."""
        assert self.names, "nothing has passed yet"
        sums = torch.stack(self.sums).tolist()
        lines = sorted(f"{name} {total} {weighted}" for name, (total, weighted) in zip(self.names, sums, strict=True))
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


def bit_sums(tensor: Tensor) -> Tensor:
    """[2] int64: the sum of the tensor's bits as 64-bit words, and that of each word times its position from 1 on."""
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_words = len(octets) // 8
    whole = octets[: 8 * num_words]
    if whole.storage_offset() % 8:  # a slice of a flat buffer
        whole = whole.clone()
    words, rest = whole.view(torch.int64), octets[8 * num_words :].long()
    num_rows = num_words // COLUMNS
    # Sums of rows and columns give the weighted sum without a product as large as the tensor.
    matrix, ragged = words[: num_rows * COLUMNS].view(num_rows, COLUMNS), words[num_rows * COLUMNS :]
    tail = torch.cat([ragged, rest])
    by_row, by_column = matrix.sum(1), matrix.sum(0)
    rows = COLUMNS * torch.arange(num_rows, device=tensor.device)
    places = torch.arange(1, COLUMNS + 8, device=tensor.device)
    weighted = (by_row * rows).sum() + (by_column * places[:COLUMNS]).sum()
    weighted = weighted + (tail * (COLUMNS * num_rows + places[: len(tail)])).sum()
    return torch.stack([by_row.sum() + tail.sum(), weighted])
