"""What a stream of (Hugging Face name, whole tensor) can pass through on its way to a rollout engine.

A filter takes a stream and gives a stream, one tensor at a time, on every rank alike: filters may be chained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Stream = Iterable[tuple[str, Tensor]]

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
# Kept as they are where the linears are quantised, as published FP8 checkpoints have it.
UNQUANTISED = ("embed_tokens", "tok_embeddings", "lm_head", "output.weight", "score.weight", "norm", "mlp.gate.weight")


def cast(stream: Stream, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor.to(dtype)


def quantise_fp8(stream: Stream, block: int = 128) -> Iterator[tuple[str, Tensor]]:
    """Weights of linears as float8_e4m3fn in square blocks, each followed by its `weight_scale_inv`.

    The format of DeepSeek-V3's and Qwen3's FP8 checkpoints, which SGLang and vLLM read with quant_method "fp8" and
    weight_block_size [block, block]: weight = quantised * scale of its block, scales [rows / block, columns / block].
    """
    for name, tensor in stream:
        if tensor.dim() == 2 and name.endswith(".weight") and not any(part in name for part in UNQUANTISED):
            quantised, scales = fp8_blocks(tensor, block)
            yield name, quantised
            yield f"{name}_scale_inv", scales
        else:
            yield name, tensor


def fp8_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """weight [R, C] -> (float8_e4m3fn [R, C], float32 scales [ceil(R / block), ceil(C / block)])."""
    num_rows, num_columns = weight.shape
    padded = F.pad(weight.float(), (0, -num_columns % block, 0, -num_rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [R / block, block, C / block, block]
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    # A block of zeros has no scale of its own.
    scales = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    quantised = (blocks / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    whole = quantised.flatten(2, 3).flatten(0, 1)[:num_rows, :num_columns].contiguous()
    return whole, scales[:, 0, :, 0].contiguous()
