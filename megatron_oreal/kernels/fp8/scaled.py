"""Quantises matrices to float8 e4m3 with their scales, and multiplies them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.kernels.tiles import row_blocks

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
SMALLEST_SCALE = 2.0**-100  # of an all-zero row; its inverse is finite
ALIGNMENT = 16  # elements that both sides of an FP8 product must be multiples of
Backend = Literal["torch", "transformer_engine"]
Scaling = Literal["tensor", "row", "block", "mx"]  # one scale a tensor, a row, a block of 128, a block of 32


@dataclass(frozen=True, slots=True)
class Fp8Options:
    """Row scales make a token's logits independent of the tokens beside it; both scalings are equally accurate."""

    backend: Backend = "torch"
    scaling: Scaling = "row"  # of values; gradients under torch have one scale a tensor
    num_exact: int = 64  # largest logits a token that are computed again without FP8


class Fp8Products(Protocol):
    """What a backend computes; quantised weights are opaque, because their layout is the backend's."""

    def weight_for_logits(self, weight: Tensor) -> Any: ...

    def weight_for_grad_hidden(self, weight: Tensor) -> Any: ...

    def logits(self, hidden: Tensor, weight: Any, out: Tensor | None) -> Tensor:
        """[t, H], quantised [v, H] -> [t, v] float32, in `out` or in new memory."""
        ...

    def grad_hidden(self, grad_logits: Tensor, weight: Any, out: Tensor, accumulate: bool) -> None: ...

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None: ...


def check_capability(device: torch.device, needed: tuple[int, int], what: str) -> None:
    """Raises ValueError unless `device` is an NVIDIA GPU of at least this compute capability."""
    if device.type != "cuda" or torch.version.cuda is None:
        raise ValueError(f"{what} needs an NVIDIA GPU of compute capability >= {needed[0]}.{needed[1]}: use bf16")
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < needed:
        raise ValueError(
            f"{what} needs compute capability >= {needed[0]}.{needed[1]}, "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: use bf16"
        )


@dataclass(frozen=True, slots=True)
class ScaledMatrix:
    """[R, K] in e4m3 with rows and columns padded to multiples of ALIGNMENT; times `scale`, it is the matrix."""

    values: Tensor  # contiguous: an FP8 product contracts the last dimension of both sides
    scale: Tensor  # float32, [] or [R padded, 1]
    num_rows: int

    def transposed(self, num_rows: int) -> ScaledMatrix:
        assert self.scale.dim() == 0
        return ScaledMatrix(self.values.T.contiguous(), self.scale, num_rows)

    def part(self, rows: slice) -> ScaledMatrix:
        """These rows, from a multiple of ALIGNMENT on."""
        assert self.scale.dim() == 0
        values = self.values[rows.start : rows.stop + -rows.stop % ALIGNMENT]
        return ScaledMatrix(values, self.scale, rows.stop - rows.start)


def quantize(matrix: Tensor, per_row: bool) -> ScaledMatrix:
    """NaN and infinities make the scale NaN or infinite, and the product NaN: they are not hidden."""
    num_rows, num_columns = matrix.shape
    blocks = row_blocks(num_rows, 4 * num_columns, matrix.is_cuda)
    norm = partial(torch.linalg.vector_norm, ord=torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    largest = torch.cat([norm(matrix[rows]) for rows in blocks])
    scale = ((largest if per_row else largest.amax()) / E4M3_MAX).clamp_min(SMALLEST_SCALE)
    inverse = scale.reciprocal()
    shape = (num_rows + -num_rows % ALIGNMENT, num_columns + -num_columns % ALIGNMENT)
    values = torch.empty(shape, dtype=E4M3, device=matrix.device)
    if shape != matrix.shape:
        values.view(torch.uint8).zero_()
    for rows in blocks:
        values[rows, :num_columns] = matrix[rows] * (inverse[rows] if per_row else inverse)
    if per_row:
        scale = F.pad(scale, (0, 0, 0, shape[0] - num_rows))
    return ScaledMatrix(values, scale, num_rows)


def scaled_product(left: ScaledMatrix, right: ScaledMatrix, fast: bool, out: Tensor | None = None) -> Tensor:
    """left @ right.T, [left.num_rows, right.num_rows] float32. `fast` accumulates with fewer bits on Hopper."""
    by_row = left.scale.dim() > 0
    product = torch._scaled_mm(
        left.values,
        right.values.T,
        scale_a=left.scale,
        scale_b=right.scale.T if by_row else right.scale,
        # Row scales give half precision only on CUDA; on a CPU the same, so that it is the same method.
        out_dtype=torch.bfloat16 if by_row else torch.float32,
        use_fast_accum=fast,
    )
    product = product[: left.num_rows, : right.num_rows]
    return product.float().contiguous() if out is None else out.copy_(product)


def product_blocks(out: Tensor) -> list[slice]:
    """Rows of a float32 product that is stored in `out` [R, K] afterwards."""
    return row_blocks(len(out), 4 * out.shape[1], out.is_cuda, multiple_of=ALIGNMENT)


def store(product: Tensor, out: Tensor, accumulate: bool) -> None:
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)
