"""Filters that change a weight stream: a filter takes a stream and gives another one, tensor by tensor.

Filters may be chained. Every rank must apply the same ones, because iterating a stream may run collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Stream = Iterable[tuple[str, Tensor]]  # Hugging Face name, whole tensor: ("model.norm.weight", tensor[H]), ...

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
FP8_BLOCK = 128  # rows and columns of a block
SLAB_ELEMENTS = 2**24  # elements of a weight that are quantised at a time
# Tensors with these parts in their names are not quantised; published FP8 checkpoints keep them too.
UNQUANTISED = ("embed_tokens", "tok_embeddings", "lm_head", "output.weight", "score.weight", "norm", "mlp.gate.weight")


def cast(stream: Stream, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Gives every tensor this dtype."""
    for name, tensor in stream:
        yield name, tensor.to(dtype)


def quantise_fp8(stream: Stream, block: int = FP8_BLOCK) -> Iterator[tuple[str, Tensor]]:
    """Quantises the weights of linears to float8_e4m3fn in square blocks; each is followed by its `weight_scale_inv`.

    This is the format of DeepSeek-V3's and Qwen3's FP8 checkpoints. SGLang and vLLM read it with quant_method "fp8" and
    weight_block_size [block, block]: weight = quantised * scale of its block, scales [rows / block, columns / block].
    """
    for name, tensor in stream:
        if tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in UNQUANTISED):
            quantised, scales = fp8_blocks(tensor, block)
            yield name, quantised
            yield f"{name}_scale_inv", scales
        else:
            yield name, tensor


def fp8_settings(names: Iterable[str], block: int = FP8_BLOCK) -> dict[str, Any]:
    """Returns config.json's quantization_config for tensors that have these names after `quantise_fp8`."""
    names = list(names)
    quantised = {name.removesuffix("_scale_inv") for name in names if name.endswith("_scale_inv")}
    linears = [name.removesuffix(".weight") for name in names if name.endswith(("lm_head.weight", ".gate.weight"))]
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": [name for name in linears if f"{name}.weight" not in quantised],
    }


def fp8_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Quantises weight [R, C]: float8_e4m3fn [R, C], and float32 scales [ceil(R / block), ceil(C / block)]."""
    num_rows, num_columns = weight.shape
    quantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales = weight.new_empty(-(-num_rows // block), -(-num_columns // block), dtype=torch.float32)
    slab = max(1, SLAB_ELEMENTS // (num_columns * block))  # rows of blocks, so that float32 copies stay small
    for begin in range(0, len(scales), slab):
        rows = slice(begin * block, (begin + slab) * block)
        quantised[rows], scales[begin : begin + slab] = fp8_slab(weight[rows], block)
    return quantised, scales


def fp8_slab(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = weight.shape
    padded = F.pad(weight.float(), (0, -num_columns % block, 0, -num_rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [R / block, block, C / block, block]
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    # A block of zeros determines no scale, so it gets the scale 1.
    scales = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    quantised = (blocks / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return quantised.flatten(2, 3).flatten(0, 1)[:num_rows, :num_columns], scales[:, 0, :, 0]
