"""FP8 products through Transformer Engine's quantizers and its general_gemm. Written against its versions 2.10 to 2.20.

Not run on hardware yet: tests/gpu/test_fp8.py compares it with torch._scaled_mm where both are. Everything that is
known of Transformer Engine is in this file.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.kernels.fp8.scaled import Scaling, check_capability, product_blocks, store

MIN_VERSION = (2, 10)  # from here general_gemm brings its own workspace
NEEDED_CAPABILITY: dict[Scaling, tuple[int, int]] = {"tensor": (8, 9), "block": (9, 0), "mx": (10, 0)}
BLOCK_CUDA_VERSION = (12, 9)  # block scales are a feature of its cuBLASLt
ALIGNMENT: dict[Scaling, int] = {"tensor": 16, "block": 16, "mx": 32}  # elements, of both dimensions of every operand


class TransformerEngineProducts:
    """Fp8Products (fp8.py) with one scale a tensor, a block of 128 (Hopper and later) or of 32 (MXFP8: Blackwell).

    Raises ValueError naming what is missing.
    """

    def __init__(self, device: torch.device, scaling: Scaling) -> None:
        if scaling not in NEEDED_CAPABILITY:
            raise ValueError(f"fp8 scaling {scaling!r} needs the torch backend: use tensor, block or mx")
        what = f"fp8 with {scaling} scales through Transformer Engine"
        check_scaling(scaling, device, what)
        check_version(what)
        self.device, self.scaling, self.alignment = device, scaling, ALIGNMENT[scaling]

    def weight_for_logits(self, weight: Tensor) -> Any:
        return self._quantize(weight, is_weight=True, transposed=False)

    def weight_for_grad_hidden(self, weight: Tensor) -> Any:
        return self._quantize(weight, is_weight=True, transposed=True)

    def logits(self, hidden: Tensor, weight: Any, out: Tensor | None) -> Tensor:
        tokens = self._quantize(hidden, is_weight=False, transposed=False)
        product = gemm(weight, tokens, layout="TN", fast=True)[: len(hidden)]
        return product if out is None else out.copy_(product)

    def grad_hidden(self, grad_logits: Tensor, weight: Any, out: Tensor, accumulate: bool) -> None:
        for rows in product_blocks(out):
            gradient = self._quantize(grad_logits[rows], is_weight=False, transposed=False)
            product = gemm(weight, gradient, layout="NN", fast=False)[: rows.stop - rows.start]
            store(product, out[rows], accumulate)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        gradient = self._quantize(grad_logits, is_weight=False, transposed=True)
        tokens = self._quantize(hidden, is_weight=False, transposed=True)
        gemm(tokens, gradient, layout="NT", fast=False, out=out, accumulate=accumulate)

    def _quantize(self, matrix: Tensor, is_weight: bool, transposed: bool) -> Any:
        """`transposed`: for a product that contracts the rows."""
        num_rows, num_columns = matrix.shape
        if num_columns % self.alignment or (is_weight and num_rows % self.alignment):
            raise ValueError(
                f"fp8 through Transformer Engine needs hidden size and vocabulary a rank in multiples of "
                f"{self.alignment}, got {num_rows} x {num_columns}: use the torch backend"
            )
        if num_rows % self.alignment:
            matrix = F.pad(matrix, (0, 0, 0, -num_rows % self.alignment))
        with torch.no_grad():
            return self._quantizer(is_weight, transposed).quantize(matrix.contiguous())

    def _quantizer(self, is_weight: bool, transposed: bool) -> Any:
        import transformer_engine_torch as tex

        e4m3 = tex.DType.kFloat8E4M3
        # With one scale a tensor, only the transposed copy by itself cannot be made.
        usage = {"rowwise": not transposed or self.scaling == "tensor", "columnwise": transposed}
        if self.scaling == "tensor":
            from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

            return Float8CurrentScalingQuantizer(e4m3, device=self.device, **usage)
        if self.scaling == "block":
            from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer

            return Float8BlockQuantizer(e4m3, block_scaling_dim=2 if is_weight else 1, **usage)
        from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer

        return MXFP8Quantizer(e4m3, **usage)


def gemm(
    left: Any, right: Any, *, layout: str, fast: bool, out: Tensor | None = None, accumulate: bool = False
) -> Tensor:
    """general_gemm names its operands in column-major order.

    TN: right @ left.T; NN: right @ left; NT: right.T @ left. float32 unless `out` says otherwise.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    product, *_ = general_gemm(
        left,
        right,
        out_dtype=torch.float32 if out is None else out.dtype,
        layout=layout,
        out=out,
        accumulate=accumulate,
        use_split_accumulator=not fast,
        grad=layout != "TN",
    )
    return product  # type: ignore[no-any-return]


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
