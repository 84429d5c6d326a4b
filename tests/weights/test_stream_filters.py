"""Casting and FP8 blocks on the way out."""

from __future__ import annotations

import pytest
import torch

from megatron_oreal.weights import stream_filters
from megatron_oreal.weights.stream_filters import FP8_MAX, cast, fp8_blocks, quantise_fp8


def test_cast_keeps_names_and_order() -> None:
    stream = [("b", torch.ones(2)), ("a", torch.zeros(1))]
    assert [(name, tensor.dtype) for name, tensor in cast(stream, torch.bfloat16)] == [
        ("b", torch.bfloat16),
        ("a", torch.bfloat16),
    ]


@pytest.mark.parametrize("shape", [(256, 384), (130, 200), (3, 5)])
def test_every_block_has_its_own_scale_and_small_error(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_filters, "SLAB_ELEMENTS", 130 * 128)  # several slabs
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-3, 2, shape[1])
    quantised, scales = fp8_blocks(weight, 128)
    assert quantised.shape == weight.shape and quantised.dtype == torch.float8_e4m3fn
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            part = (slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128))
            scale = scales[row, column]
            assert scale == weight[part].abs().max() / FP8_MAX
            error = (quantised[part].float() * scale - weight[part]).abs()
            # Half a unit of three mantissa bits, or of the smallest subnormal.
            assert (error <= (weight[part].abs() / 16 + scale * 2**-10) * 1.001).all()


def test_zeros_stay_zeros() -> None:
    quantised, scales = fp8_blocks(torch.zeros(4, 4), 2)
    assert not quantised.float().any() and (scales == 1).all()


def test_only_the_linears_of_the_layers_are_quantised() -> None:
    names = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.gate_proj.weight",
        "lm_head.weight",
    ]
    stream = [(name, torch.ones(4, 4) if "proj.weight" in name or "gate" in name else torch.ones(4)) for name in names]
    found = [name for name, tensor in quantise_fp8(stream) if tensor.dtype == torch.float8_e4m3fn]
    assert found == ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"]
    scales = [name for name, _ in quantise_fp8(stream) if name.endswith("_scale_inv")]
    assert scales == [f"{name}_scale_inv" for name in found]
