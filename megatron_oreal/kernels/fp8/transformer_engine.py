"""Computes FP8 products with Transformer Engine's quantizers and general_gemm, for its versions 2.10 to 2.20.

It has not run on hardware: tests/gpu/test_fp8.py checks it if Transformer Engine can be imported. This module contains
all calls to Transformer Engine's quantizers.
"""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.kernels.blocks import TILE_BYTES, Block
from megatron_oreal.kernels.fp8.scaled import Scaling, check_capability
from megatron_oreal.kernels.vocabulary_reduction import Call, Upstream

MIN_VERSION = (2, 10)  # from this version on, general_gemm allocates its own workspace
NEEDED_CAPABILITY: dict[Scaling, tuple[int, int]] = {"tensor": (8, 9), "block": (9, 0), "mx": (10, 0)}
BLOCK_CUDA_VERSION = (12, 9)  # block scales are a feature of its cuBLASLt
ALIGNMENT: dict[Scaling, int] = {"tensor": 16, "block": 16, "mx": 32}  # elements, of both dimensions of every operand


class TransformerEngineGradients:
    """Quantises with one scale per tensor, per block of 128 numbers (Hopper and later) or of 32 (MXFP8: Blackwell).

    A tile's gradients are made in half precision; one quantiser casts them in both layouts, and the products are added
    to their sums in place.
    """

    def __init__(self, device: torch.device, scaling: Scaling) -> None:
        self.device, self.scaling, self.alignment = device, scaling, ALIGNMENT[scaling]

    def memory(self, weight: Tensor) -> tuple[int, int]:
        # Bytes per token: its hidden state's float32 gradient, and that state, padded and in two layouts.
        return TILE_BYTES, 8 * weight.shape[1]

    def add(
        self,
        call: Call,
        block: Block,
        upstream: Upstream,
        hidden: Tensor,
        weight: Tensor,
        of_hidden: Tensor | None,
        of_weight: Tensor | None,
        accumulate: bool,
    ) -> None:
        tokens = self._quantize(hidden, is_weight=False, transposed=True) if of_weight is not None else None
        summed = None if of_hidden is None else self._padded(of_hidden)
        for columns, tile in block.tiles():
            gradient = torch.zeros(
                padded_to(len(hidden), self.alignment),
                columns.stop - columns.start,
                dtype=hidden.dtype,
                device=self.device,
            )
            place = call.place(upstream.target, columns)
            call.rows.gradient_of_kept(
                tile, *place, upstream.logsumexp, upstream.entropy, upstream.scales, gradient[: len(hidden)]
            )
            quantized = self._quantize(gradient, is_weight=False, transposed=True)
            if summed is not None:
                part = self._quantize(weight[columns], is_weight=True, transposed=True)
                gemm(part, quantized, layout="NN", out=summed, accumulate=columns.start > 0)
            if of_weight is not None:
                gemm(tokens, quantized, layout="NT", out=of_weight[columns], accumulate=accumulate)
        if of_hidden is not None and summed is not None and summed is not of_hidden:
            of_hidden.copy_(summed[: len(of_hidden)])

    def _padded(self, matrix: Tensor) -> Tensor:
        """Returns the matrix, or new memory with as many rows as its quantised product has."""
        num_rows = padded_to(len(matrix), self.alignment)
        return matrix if num_rows == len(matrix) else matrix.new_empty(num_rows, matrix.shape[1])

    def _quantize(self, matrix: Tensor, is_weight: bool, transposed: bool) -> Any:
        """Quantises a matrix; with `transposed`, also for a product that sums over the rows."""
        num_rows, num_columns = matrix.shape
        if num_columns % self.alignment or (is_weight and num_rows % self.alignment):
            raise ValueError(
                f"fp8 through Transformer Engine needs hidden size and vocabulary a rank in multiples of "
                f"{self.alignment}, got {num_rows} x {num_columns}: use model.head_fp8=torch"
            )
        if num_rows % self.alignment:
            matrix = F.pad(matrix, (0, 0, 0, -num_rows % self.alignment))
        with torch.no_grad():
            return self._quantizer(is_weight, transposed).quantize(matrix.contiguous())

    def _quantizer(self, is_weight: bool, transposed: bool) -> Any:
        import transformer_engine_torch as tex

        e4m3 = tex.DType.kFloat8E4M3
        usage = {"rowwise": True, "columnwise": transposed}
        if self.scaling == "tensor":
            from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

            return Float8CurrentScalingQuantizer(e4m3, device=self.device, **usage)
        if self.scaling == "block":
            from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

            return Float8BlockQuantizer(e4m3, block_scaling_dim=2 if is_weight else 1, **usage)
        from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

        return MXFP8Quantizer(e4m3, **usage)


def gemm(left: Any, right: Any, *, layout: str, out: Tensor, accumulate: bool) -> None:
    """Computes out = or += a product. general_gemm names its operands in column-major order.

    NN: right @ left; NT: right.T @ left.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        left,
        right,
        out_dtype=out.dtype,
        layout=layout,
        out=out,
        accumulate=accumulate,
        use_split_accumulator=True,
        grad=True,
    )


def padded_to(size: int, alignment: int) -> int:
    return ceil(size / alignment) * alignment


def check_available(scaling: Scaling, device: torch.device) -> None:
    """Raises ValueError naming what is missing for this kind of scales on this device."""
    what = f"fp8 with {scaling} scales through Transformer Engine"
    check_scaling(scaling, device, what)
    check_version(what)


def check_version(what: str, needed: tuple[int, int] = MIN_VERSION) -> None:
    """Raises ValueError unless a Transformer Engine of at least this version can be imported."""
    try:
        import transformer_engine
        import transformer_engine.pytorch
    except (ImportError, OSError) as error:  # OSError: a library that it loads is missing
        reason = str(error).splitlines()[0]
        raise ValueError(f"{what} cannot import transformer_engine ({reason}): install it, or do without") from None
    version = str(transformer_engine.__version__)
    if version_numbers(version) < needed:
        raise ValueError(f"{what} needs transformer_engine >= {needed[0]}.{needed[1]}, found {version}: update it")


def check_scaling(scaling: Scaling, device: torch.device, what: str) -> None:
    """Raises ValueError naming what this kind of scales lacks on this device."""
    check_capability(device, NEEDED_CAPABILITY[scaling], what)
    if scaling == "block" and cuda_version() < BLOCK_CUDA_VERSION:
        raise ValueError(f"{what} needs CUDA >= 12.9, torch was built for {torch.version.cuda}: use tensor scales")
    if scaling == "mx" and torch.cuda.get_device_capability(device) >= (12, 0):
        raise ValueError(f"{what} is not supported from compute capability 12.0 on: use tensor scales")


def version_numbers(version: str) -> tuple[int, int]:
    major, minor, *_ = version.split(".")
    return int(major), int(minor)


def cuda_version() -> tuple[int, int]:
    assert torch.version.cuda is not None
    return version_numbers(torch.version.cuda)
