"""FP8 settings of the transformer layers: Megatron takes them, and what is missing is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_oreal.config import Fp8Recipe, ModelConfig, ParallelConfig
from megatron_oreal.models import build, fp8_layers, parallel
from megatron_oreal.models.fp8_layers import check_ends, check_recipe, recipe_settings
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import write_tiny_model


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0)
    parallel.finalize()


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
    assert [is_first_last_bf16_layer(config, layer) for layer in range(8)] == 2 * [True] + 4 * [False] + 2 * [True]


@pytest.mark.parametrize(("num_layers", "pipeline_size", "most"), [(8, 1, 3), (9, 1, 4), (8, 4, 2), (2, 1, 0)])
def test_too_many_layers_in_bf16_are_refused(num_layers: int, pipeline_size: int, most: int) -> None:
    check_ends(most, num_layers, pipeline_size)
    with pytest.raises(
        ValueError, match=rf"model\.fp8_bf16_ends={most + 1} must be <= {most}: .*of {num_layers} layers"
    ):
        check_ends(most + 1, num_layers, pipeline_size)


def test_the_configuration_reaches_megatron(
    tmp_path: Path, layout: ParallelLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the device and Transformer Engine have all that the recipe needs."""
    monkeypatch.setattr(fp8_layers, "check_recipe", lambda _recipe, _device: None)
    monkeypatch.setattr(build, "TransformerConfig", lambda **settings: settings)
    path = write_tiny_model(tmp_path, tied=False)
    config = ModelConfig(path=path, dtype="bfloat16", fp8="blockwise", fp8_bf16_ends=1)
    settings: Any = build.transformer_config(read_architecture(path), config, layout, transformer_engine=True)
    assert (settings["fp8_recipe"], settings["first_last_layers_bf16"]) == ("blockwise", True)
    assert settings["num_layers_at_start_in_bf16"] == settings["num_layers_at_end_in_bf16"] == 1
    config = config.model_copy(update={"fp8_bf16_ends": 2})
    with pytest.raises(ValueError, match=r"model\.fp8_bf16_ends=2 must be <= 1"):
        build.transformer_config(read_architecture(path), config, layout, transformer_engine=True)


@pytest.mark.parametrize(
    ("recipe", "capability"), [("tensorwise", "8.9"), ("blockwise", "9.0"), ("mxfp8", "10.0"), ("delayed", "8.9")]
)
def test_what_is_missing_is_named(recipe: Fp8Recipe, capability: str) -> None:
    with pytest.raises(
        ValueError, match=rf"model\.fp8={recipe} needs an NVIDIA GPU of compute capability >= {capability}"
    ):
        check_recipe(recipe, torch.device("cpu"))
