"""Casting, FP8 blocks and LoRA adapters on the way out."""

from __future__ import annotations

import pytest
import torch

from megatron_oreal.weights import stream_filters
from megatron_oreal.weights.stream_filters import FP8_MAX, cast, fp8_blocks, merge_lora, quantise_fp8


def test_cast_keeps_names_and_order() -> None:
    stream = [("b", torch.ones(2)), ("a", torch.zeros(1))]
    assert [(name, tensor.dtype) for name, tensor in cast(stream, torch.bfloat16)] == [
        ("b", torch.bfloat16),
        ("a", torch.bfloat16),
    ]


def test_adapters_are_added_to_the_weights_that_they_name() -> None:
    down, up = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0], [20.0]])  # of rank 1
    stream = [("a", torch.ones(2, 3, dtype=torch.bfloat16)), ("b", torch.ones(2, 3))]
    merged = dict(merge_lora(stream, {"a": (down, up)}, scale=0.5))
    assert merged["a"].tolist() == [[6.0, 11.0, 16.0], [11.0, 21.0, 31.0]] and merged["a"].dtype == torch.bfloat16
    assert torch.equal(merged["b"], torch.ones(2, 3))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({"c": (torch.ones(1, 3), torch.ones(2, 1))}, "no weight c"),
        ({"a": (torch.ones(1, 2), torch.ones(2, 1))}, r"a is \(2, 3\), A \(1, 2\) and B \(2, 1\) do not fit"),
        ({"a": (torch.ones(2, 3), torch.ones(2, 1))}, "do not fit"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_after_the_stream(
    adapters: dict[str, tuple[torch.Tensor, torch.Tensor]], message: str
) -> None:
    taken = []
    with pytest.raises(ValueError, match=message):
        for name, _ in merge_lora((taken.append(n) or (n, torch.ones(2, 3)) for n in "ab"), adapters, 1.0):  # type: ignore[func-returns-value]
            assert name not in adapters
    assert taken == ["a", "b"]


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
