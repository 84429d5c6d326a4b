"""Chooses the arithmetic of a precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import get_args

import torch

from megatron_oreal.kernels.block_passes import HalfPrecisionGradients
from megatron_oreal.kernels.fp8.gradients import TorchFp8Gradients
from megatron_oreal.kernels.fp8.scaled import Fp8Options, check_capability
from megatron_oreal.kernels.products import Precision, Products
from megatron_oreal.kernels.vocabulary_reduction import BlockGradients

HALF_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Defines which products a call of linear_logprob uses."""

    products: Products
    # Makes the gradients of one call; None: from tiles of float32 logits, with `products`
    make_gradients: Callable[[], BlockGradients] | None = None


def make_arithmetic(
    precision: Precision, device: torch.device, dtype: torch.dtype, fp8: Fp8Options | None = None
) -> Arithmetic:
    """Chooses the products for inputs of `dtype`. Raises ValueError for a precision that this device does not have."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision}")
    # On a CPU, a product of half-precision inputs is rounded to half precision, and is slower than one in float32.
    in_float32 = precision == "fp32" or device.type == "cpu" or dtype not in HALF_PRECISION
    products = Products(torch.float32 if in_float32 else dtype)
    if precision == "fp8_grad":
        return Arithmetic(products, fp8_gradients(device, fp8 or Fp8Options()))
    return Arithmetic(products, None if in_float32 else partial(HalfPrecisionGradients, products, dtype))


def fp8_gradients(device: torch.device, options: Fp8Options) -> Callable[[], BlockGradients]:
    """Raises ValueError naming what is missing."""
    check_fp8(device, options)
    if options.backend == "torch":
        return TorchFp8Gradients
    from megatron_oreal.kernels.fp8.transformer_engine import TransformerEngineGradients

    return partial(TransformerEngineGradients, device, options.scaling)


def check_fp8(device: torch.device, options: Fp8Options) -> None:
    """Raises ValueError naming what FP8 products lack on this device. torch's run on a CPU too, for tests."""
    if options.backend == "transformer_engine":
        from megatron_oreal.kernels.fp8.transformer_engine import check_available

        check_available(options.scaling, device)
    elif device.type != "cpu":
        check_capability(device, (8, 9), "fp8 through torch._scaled_mm")
