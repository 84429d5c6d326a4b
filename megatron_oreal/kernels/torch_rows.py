"""Implements the passes over a tile of logits that are not matrix products in plain torch; triton_rows.py, for CUDA.

They process the tile in blocks of rows that stay in the processor's cache, and so need little memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 2**20
CUDA_BLOCK_BYTES = 2**26
SHIFT_COLUMNS = 4096  # columns of a tile that share a shift; a Triton program reads this many at a time
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True, slots=True)
class Exponentials:
    """exp(z - shift) of a tile's logits, with half the bytes of float32 logits and bfloat16's relative error.

    z = logits / temperature. A probability is exp(z - shift) exp(shift - logsumexp).
    """

    values: Tensor  # [t, v] bfloat16, in [0, 1]; 0 in padding
    shifts: Tensor  # [t, ceil(v / SHIFT_COLUMNS)] float32: the largest z of a row in these columns and those before

    @staticmethod
    def num_shifts(num_columns: int) -> int:
        return -(-num_columns // SHIFT_COLUMNS)


def reduce_rows(
    logits: Tensor,  # [t, v] float32
    target: Tensor,  # [t] int64, column of the tile; outside [0, num_valid) it is elsewhere
    num_valid: int,  # columns; the others are padding
    temperature: float,
    with_entropy: bool,
    kept: Exponentials | None = None,
) -> Tensor:
    """Returns [3, t]: maximum m, sum exp(z - m), the target's z or -inf; with entropy [4, t]: sum exp(z - m) (z - m).

    z = logits / temperature. The function does not change the logits. A NaN among them makes the sum NaN. If `kept` is
    given, it receives the exponentials.
    """
    if kept is not None:
        keep_exponentials(logits, num_valid, temperature, kept)
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
    """Returns d loss / d logits [t, v] in `dtype`, 0 from column `num_valid` on; float32 overwrites the logits.

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


def keep_exponentials(logits: Tensor, num_valid: int, temperature: float, kept: Exponentials) -> None:
    highest = torch.full_like(logits[:, :1], -3.0e38)
    for index, start in enumerate(range(0, logits.shape[1], SHIFT_COLUMNS)):
        columns = slice(start, start + SHIFT_COLUMNS)
        values = logits[:, columns] / temperature
        values[:, max(0, num_valid - start) :] = -torch.inf
        highest = torch.maximum(highest, values.amax(1, keepdim=True))
        kept.shifts[:, index] = highest[:, 0]
        kept.values[:, columns] = values.sub_(highest).exp_()


def gradient_of_kept(
    kept: Exponentials,
    target: Tensor,  # these are as in gradient_rows
    num_valid: int,
    logsumexp: Tensor,
    entropy: Tensor | None,
    scales: Tensor,
    out: Tensor,  # [t, v] half precision; may be the memory of the kept exponentials
) -> None:
    """Computes d loss / d logits from kept exponentials."""
    out.copy_(_gradient_of_kept(kept, target, num_valid, logsumexp, entropy, scales))


def fp8_gradient_of_kept(
    kept: Exponentials,
    target: Tensor,  # these are as in gradient_rows
    num_valid: int,
    logsumexp: Tensor,
    entropy: Tensor | None,
    scales: Tensor,
    bounds: Tensor,  # [t], at least the size of the gradients of a token
    out: Tensor,  # [t or more, v or more] e4m3; multiples of 16
    transposed: Tensor,  # its transpose
) -> None:
    """Returns (d loss / d logits) E4M3_MAX / bounds, from kept exponentials, in both layouts; 0 beyond t and v."""
    gradient = _gradient_of_kept(kept, target, num_valid, logsumexp, entropy, scales)
    values = gradient.mul_((E4M3_MAX / bounds)[:, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    out.copy_(padded(values, *out.shape))
    transposed.copy_(out.T)


def _gradient_of_kept(
    kept: Exponentials, target: Tensor, num_valid: int, logsumexp: Tensor, entropy: Tensor | None, scales: Tensor
) -> Tensor:
    """Returns the gradient [t, v] in float32."""
    onehot_scale, probs_scale, entropy_scale = scales[:, :, None].unbind()
    local, inside = local_target(target, num_valid)
    num_columns = kept.values.shape[1]
    lower = (kept.shifts - logsumexp[:, None]).repeat_interleave(SHIFT_COLUMNS, dim=1)[:, :num_columns]
    exponentials = kept.values.float()
    values = exponentials * lower.exp()
    if entropy is None:
        values *= probs_scale
    else:
        surprise = torch.where(exponentials > 0, exponentials.log(), 0.0) + lower + entropy[:, None]
        values *= probs_scale - entropy_scale * surprise
    values.scatter_add_(1, local[:, None], onehot_scale * inside[:, None])
    values[:, num_valid:] = 0.0
    return values


def cast_transpose(matrix: Tensor, factors: Tensor | None, scale: Tensor, out: Tensor) -> None:
    """Writes (matrix [m, n] * factors [m, 1] / scale).T to `out`, e4m3 with sizes in multiples of 16; 0 beyond."""
    product = matrix.float() if factors is None else matrix.float() * factors[:, None]
    out.copy_(padded((product / scale).clamp_(-E4M3_MAX, E4M3_MAX).T, *out.shape))


def padded(matrix: Tensor, num_rows: int, num_columns: int) -> Tensor:
    return F.pad(matrix, (0, num_columns - matrix.shape[1], 0, num_rows - matrix.shape[0]))


def local_target(target: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
    """Returns each target's column in the tile (0 if the tile does not have it), and whether the tile has it."""
    inside = (target >= 0) & (target < num_valid)
    return torch.where(inside, target, 0), inside


def blocks(logits: Tensor) -> Iterator[slice]:
    size = max(1, (CUDA_BLOCK_BYTES if logits.is_cuda else BLOCK_BYTES) // (4 * max(1, logits.shape[1])))
    return (slice(start, start + size) for start in range(0, len(logits), size))
