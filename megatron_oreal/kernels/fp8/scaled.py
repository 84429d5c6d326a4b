"""Quantises matrices to float8 e4m3 with one scale per matrix, and multiplies them with torch._scaled_mm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Literal

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
SMALLEST_SCALE = 2.0**-100  # of an all-zero matrix; its inverse is finite
ALIGNMENT = 16  # elements that the dimensions of an FP8 product must be multiples of
Backend = Literal["torch", "transformer_engine"]
Scaling = Literal["tensor", "block", "mx"]  # one scale a tensor, a block of 128, a block of 32


@dataclass(frozen=True, slots=True)
class Fp8Options:
    """The library whose FP8 products the gradients use. For torch's, our kernels quantise with one scale a token."""

    backend: Backend = "torch"
    scaling: Scaling = "tensor"  # through Transformer Engine


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


def scale_of(largest: Tensor) -> Tensor:
    """Returns the scale ([] float32) that maps `largest`, a matrix's largest magnitude, to the maximum of e4m3.

    NaN and infinities make the scale NaN or infinite and the product NaN, so that they stay visible.
    """
    return (largest.float() / E4M3_MAX).clamp_min(SMALLEST_SCALE)


def aligned(size: int) -> int:
    return ceil(size / ALIGNMENT) * ALIGNMENT


def new_matrix(num_rows: int, num_columns: int, device: torch.device) -> Tensor:
    """Allocates an uninitialised e4m3 matrix of aligned dimensions."""
    return torch.empty(aligned(num_rows), aligned(num_columns), dtype=E4M3, device=device)


def scaled_product(left: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Returns (left [m, k] @ right [n, k].T) * scale in `dtype`, summed in float32; `out` [m, n] receives it if given.

    The matrices are e4m3, with aligned dimensions and contiguous rows.
    """
    one = torch.ones((), dtype=torch.float32, device=left.device)
    multiply = partial(torch._scaled_mm, left, right.T, scale_a=one, scale_b=scale, out_dtype=dtype)
    # Hopper's fast accumulation has 14 bits.
    return multiply(use_fast_accum=False) if out is None else multiply(use_fast_accum=False, out=out)
