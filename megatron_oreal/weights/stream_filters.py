"""What a stream of (Hugging Face name, whole tensor) can pass through on its way to a rollout engine.

A filter takes a stream and gives a stream, one tensor at a time, on every rank alike: filters may be chained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Stream = Iterable[tuple[str, Tensor]]

FP8_MAX = 448.0  # the largest finite float8_e4m3fn
FP8_BLOCK = 128  # rows and columns
SLAB_ELEMENTS = 2**24  # of a weight that are quantised at a time
# Kept as they are where the linears are quantised, as published FP8 checkpoints have it.
UNQUANTISED = ("embed_tokens", "tok_embeddings", "lm_head", "output.weight", "score.weight", "norm", "mlp.gate.weight")


def cast(stream: Stream, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in stream:
        yield name, tensor.to(dtype)


def merge_lora(
    stream: Stream, adapters: Mapping[str, tuple[Tensor, Tensor]], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Adds scale * B @ A, in float32, to the weights that `adapters` names: A [rank, columns], B [rows, rank].

    It goes in front of `cast` and `quantise_fp8`. Raises ValueError for adapters that fit no weight, after the stream's
    end: iterating it runs collectives that other ranks wait in.
    """
    unused, problem = dict.fromkeys(adapters), ""
    for name, weight in stream:
        if name not in adapters:
            yield name, weight
            continue
        del unused[name]
        down, up = (matrix.to(weight.device, torch.float32) for matrix in adapters[name])
        if (len(up), down.shape[-1]) != weight.shape or up.shape[-1] != len(down):
            shapes = f"A {tuple(down.shape)} and B {tuple(up.shape)}"
            problem = problem or f"adapters: {name} is {tuple(weight.shape)}, {shapes} do not fit it"
            continue
        yield name, torch.addmm(weight.float(), up, down, alpha=scale).to(weight.dtype)
    if unused and not problem:
        problem = f"adapters: the model has no weight {next(iter(unused))} ({len(unused)} such)"
    if problem:
        raise ValueError(problem)


def quantise_fp8(stream: Stream, block: int = FP8_BLOCK) -> Iterator[tuple[str, Tensor]]:
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


def fp8_settings(names: Iterable[str], block: int = FP8_BLOCK) -> dict[str, Any]:
    """config.json's quantization_config of a checkpoint whose tensors, after `quantise_fp8`, have these names."""
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
    """weight [R, C] -> (float8_e4m3fn [R, C], float32 scales [ceil(R / block), ceil(C / block)])."""
    num_rows, num_columns = weight.shape
    quantised = torch.empty_like(weight, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales = weight.new_empty(-(-num_rows // block), -(-num_columns // block), dtype=torch.float32)
    slab = max(1, SLAB_ELEMENTS // (num_columns * block))  # in blocks: float32 copies of the whole would be large
    for begin in range(0, len(scales), slab):
        rows = slice(begin * block, (begin + slab) * block)
        quantised[rows], scales[begin : begin + slab] = fp8_slab(weight[rows], block)
    return quantised, scales


def fp8_slab(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    num_rows, num_columns = weight.shape
    padded = F.pad(weight.float(), (0, -num_columns % block, 0, -num_rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [R / block, block, C / block, block]
    largest = blocks.abs().amax(dim=(1, 3), keepdim=True)
    # A block of zeros has no scale of its own.
    scales = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    quantised = (blocks / scales).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return quantised.flatten(2, 3).flatten(0, 1)[:num_rows, :num_columns], scales[:, 0, :, 0]
