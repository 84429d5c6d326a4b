"""FP8 settings of the transformer layers: Megatron takes them, and what is missing is named."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oreal.models.fp8_layers import Fp8Recipe, check_recipe, recipe_settings


@pytest.mark.parametrize("recipe", get_args(Fp8Recipe))
def test_megatron_takes_the_settings(recipe: Fp8Recipe) -> None:
    settings = recipe_settings(recipe)
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, bf16=True, **settings)
    assert config.fp8_recipe == recipe and not config.fp8_param


def test_experts_get_padded_tokens() -> None:
    """Megatron builds such a configuration only where it can import Transformer Engine."""
    settings = recipe_settings("tensorwise", has_experts=True)
    assert settings["moe_router_padding_for_quantization"]
    assert settings.keys() <= {field.name for field in fields(TransformerConfig)}


def test_layers_at_the_ends_stay_in_bf16() -> None:
    settings = recipe_settings("tensorwise", num_bf16_ends=2)
    config = TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, bf16=True, **settings)
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 2)
    with pytest.raises(ValueError, match=r"model\.fp8=delayed has no layers in bfloat16"):
        recipe_settings("delayed", num_bf16_ends=1)


@pytest.mark.parametrize(
    ("recipe", "capability"), [("tensorwise", "8.9"), ("blockwise", "9.0"), ("mxfp8", "10.0"), ("delayed", "8.9")]
)
def test_what_is_missing_is_named(recipe: Fp8Recipe, capability: str) -> None:
    with pytest.raises(
        ValueError, match=rf"model\.fp8={recipe} needs an NVIDIA GPU of compute capability >= {capability}"
    ):
        check_recipe(recipe, torch.device("cpu"))
