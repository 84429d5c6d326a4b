"""The two passes over a tile of logits that are not matrix products, in plain torch; triton_rows.py has them for CUDA.

They go over the tile in blocks of rows that stay in the processor's cache, and so need next to no memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 2**20
CUDA_BLOCK_BYTES = 2**26


def reduce_rows(
    logits: Tensor,  # [t, v] float32
    target: Tensor,  # [t] int64, column of the tile; outside [0, num_valid) it is elsewhere
    num_valid: int,  # columns; the others are padding
    temperature: float,
    with_entropy: bool,
) -> Tensor:
    """[3, t]: maximum m, sum exp(z - m), the target's z or -inf; with entropy also sum exp(z - m) (z - m).

    z = logits / temperature. The logits stay as they are. A NaN among them makes the sum NaN.
    """
    logits = logits[:, :num_valid]
    numbers = torch.empty(4 if with_entropy else 3, len(logits), dtype=torch.float32, device=logits.device)
    torch.amax(logits, dim=-1, out=numbers[0])
    local, inside = local_target(target, num_valid)
    numbers[2] = torch.where(inside, logits.gather(1, local[:, None])[:, 0], -torch.inf)
    for rows in blocks(logits):
        shifted = logits[rows] - numbers[0, rows, None]
        if temperature != 1.0:
            shifted *= 1 / temperature
        exponentials = shifted.exp()
        torch.sum(exponentials, dim=-1, out=numbers[1, rows])
        if with_entropy:
            torch.sum(exponentials.mul_(shifted), dim=-1, out=numbers[3, rows])
    numbers[[0, 2]] *= 1 / temperature
    return numbers


def gradient_rows(
    logits: Tensor,  # [t, v] float32
    target: Tensor,  # [t] int64, as in reduce_rows
    num_valid: int,
    temperature: float,
    logsumexp: Tensor,  # [t], of all columns
    entropy: Tensor | None,  # [t]; None: nothing comes from the entropy
    scales: Tensor,  # [3, t]: of the target's one-hot, of the probabilities, of d entropy / d logits
    dtype: torch.dtype,
) -> Tensor:
    """d loss / d logits [t, v] in `dtype`, 0 from column `num_valid` on; float32 takes the place of the logits.

    z = logits / temperature and p = exp(z - logsumexp): onehot scale + p scale - p (z - logsumexp + entropy) scale.
    """
    onehot_scale, probs_scale, entropy_scale = scales[:, :, None].unbind()
    local, inside = local_target(target, num_valid)
    gradient = logits if dtype is torch.float32 else torch.empty_like(logits, dtype=dtype)
    for rows in blocks(logits):
        shifted = logits[rows]
        if temperature != 1.0:
            shifted *= 1 / temperature
        shifted -= logsumexp[rows, None]
        if entropy is None:
            values = shifted.exp_().mul_(probs_scale[rows])
        else:
            probs = shifted.exp()
            surprise = shifted.add_(entropy[rows, None])
            values = surprise.mul_(-entropy_scale[rows]).add_(probs_scale[rows]).mul_(probs)
        values.scatter_add_(1, local[rows, None], onehot_scale[rows] * inside[rows, None])
        values[:, num_valid:] = 0.0
        if gradient is not logits:
            gradient[rows] = values
    return gradient


def local_target(target: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """A column of the tile for each target (0 where it is elsewhere), and whether it is here."""
    inside = (target >= 0) & (target < num_valid)
    return torch.where(inside, target, 0), inside


def blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, (CUDA_BLOCK_BYTES if logits.is_cuda else BLOCK_BYTES) // (4 * max(1, logits.shape[1])))
    return (slice(start, start + size) for start in range(0, len(logits), size))
