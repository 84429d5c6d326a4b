"""Configures FP8 for the transformer's linear layers, through Megatron's own settings and Transformer Engine.

The head is not one of these layers; linear_logprob sets its precision. Parameters stay in bfloat16, so checkpoints,
weight sync and the optimizer are unaffected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_oreal.config import Fp8Recipe
from megatron_oreal.kernels.fp8.scaled import Scaling
from megatron_oreal.kernels.fp8.transformer_engine import check_scaling, check_version
from megatron_oreal.parallel.layout import ParallelLayout


@dataclass(frozen=True, slots=True)
class Fp8RecipeNeeds:
    scaling: Scaling
    engine_version: tuple[int, int]
    # The number of tokens of a linear layer must be a multiple of this, for the gradient of its weight
    token_multiple: int
    settings: dict[str, Any]  # arguments of TransformerConfig


# hybrid uses e5m2 for the gradients of activations; with one scale per tensor they would underflow in e4m3.
RECIPES: dict[Fp8Recipe, Fp8RecipeNeeds] = {
    "tensorwise": Fp8RecipeNeeds("tensor", (2, 2), 16, {"fp8": "hybrid"}),
    "blockwise": Fp8RecipeNeeds("block", (2, 3), 16, {"fp8": "e4m3"}),
    "mxfp8": Fp8RecipeNeeds("mx", (2, 1), 32, {"fp8": "e4m3"}),
    "delayed": Fp8RecipeNeeds(
        "tensor",
        (2, 1),
        16,
        # The scales use a history of largest values. Megatron's default would use the last step alone.
        {"fp8": "hybrid", "fp8_margin": 0, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    ),
}


def fp8_layer_settings(
    recipe: Fp8Recipe,
    layout: ParallelLayout,
    transformer_engine: bool,  # whether the layers come from Transformer Engine
    *,
    num_layers: int,  # of the whole model
    has_experts: bool,
    num_bf16_ends: int,
) -> dict[str, Any]:
    """Returns arguments of TransformerConfig. The first and the last `num_bf16_ends` layers stay in bfloat16.

    Raises ValueError naming what the device, Transformer Engine or the other settings lack.
    """
    check_recipe(recipe, layout.device)
    if not transformer_engine:
        raise ValueError(f"model.fp8={recipe} needs model.implementation=auto or transformer_engine, and bfloat16")
    check_ends(num_bf16_ends, num_layers, layout.pipeline_size)
    return recipe_settings(recipe, has_experts=has_experts, num_bf16_ends=num_bf16_ends)


def check_recipe(recipe: Fp8Recipe, device: torch.device) -> None:
    what = f"model.fp8={recipe}"
    check_scaling(RECIPES[recipe].scaling, device, what)
    check_version(what, RECIPES[recipe].engine_version)


def check_ends(num_bf16_ends: int, num_layers: int, pipeline_size: int) -> None:
    """Raises ValueError for more bfloat16 layers than one stage has: Megatron keeps them in the first and the last."""
    most = min(num_layers // pipeline_size, (num_layers - 1) // 2)
    if num_bf16_ends > most:
        raise ValueError(
            f"model.fp8_bf16_ends={num_bf16_ends} must be <= {most}: less than half of {num_layers} layers, "
            f"and those of one of parallel.pipeline={pipeline_size} stages"
        )


def recipe_settings(recipe: Fp8Recipe, *, has_experts: bool = False, num_bf16_ends: int = 0) -> dict[str, Any]:
    settings = {"fp8_recipe": recipe, "fp8_param": False, **RECIPES[recipe].settings}
    if has_experts:
        settings["moe_router_padding_for_quantization"] = True  # each expert computes a product of its own tokens
    if num_bf16_ends:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": num_bf16_ends,
            "num_layers_at_end_in_bf16": num_bf16_ends,
        }
    return settings


def fp8_token_multiple(recipe: Fp8Recipe, layout: ParallelLayout) -> int:
    """Returns the number that divides the length of every packed micro-batch (PackingPlan.token_multiple)."""
    return RECIPES[recipe].token_multiple * (layout.tensor_size if layout.sequence_parallel else 1)
