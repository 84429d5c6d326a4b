"""Chooses the matrix products that belong to a precision."""

from __future__ import annotations

from typing import get_args

import torch

from megatron_oreal.kernels.fp8.gemms import Fp8Gemms
from megatron_oreal.kernels.fp8.scaled import Fp8Options, Fp8Products
from megatron_oreal.kernels.fp8.torch_products import TorchProducts
from megatron_oreal.kernels.gemms import Gemms, PlainGemms, Precision


def make_fp8_gemms(
    device: torch.device, dtype: torch.dtype, with_values: bool, options: Fp8Options | None = None
) -> Fp8Gemms:
    """FP8 products of the gradients, and with `with_values` of the logits too.

    Raises ValueError naming what FP8 lacks on this device.
    """
    options = options or Fp8Options()
    products = make_products(options, device)
    exact = None if with_values else make_gemms("bf16", device, dtype)
    return Fp8Gemms(products, exact, options.num_exact, is_cuda=device.type == "cuda")


def make_products(options: Fp8Options, device: torch.device) -> Fp8Products:
    """Raises ValueError naming what is missing on this device."""
    if options.backend == "transformer_engine":
        from megatron_oreal.kernels.fp8.transformer_engine import TransformerEngineProducts

        return TransformerEngineProducts(device, options.scaling)
    return TorchProducts(device, options.scaling)


def make_gemms(precision: Precision, device: torch.device, dtype: torch.dtype) -> Gemms:
    """For hidden states and weights of `dtype`. Raises ValueError for a precision this device does not have."""
    if precision not in get_args(Precision):
        raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, got {precision}")
    if precision in ("fp8_grad", "fp8"):
        return make_fp8_gemms(device, dtype, with_values=precision == "fp8")
    # A product of half-precision inputs on a CPU is rounded to half precision, and slower than one in float32.
    in_float32 = precision == "fp32" or device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16)
    return PlainGemms(torch.float32 if in_float32 else dtype)
