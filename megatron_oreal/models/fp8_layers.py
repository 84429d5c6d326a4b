"""FP8 for the linear layers of the transformer, through Megatron's own settings and Transformer Engine.

The head is not among them: its precision is linear_logprob's. Parameters stay in bfloat16: checkpoints, weight sync and
the optimizer see nothing of FP8.
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
    token_multiple: int  # of the tokens that one linear layer sees: they are contracted for its weight's gradient
    settings: dict[str, Any]  # of TransformerConfig


# hybrid: e5m2 for gradients of activations, which one scale a tensor would underflow in e4m3.
RECIPES: dict[Fp8Recipe, Fp8RecipeNeeds] = {
    "tensorwise": Fp8RecipeNeeds("tensor", (2, 2), 16, {"fp8": "hybrid"}),
    "blockwise": Fp8RecipeNeeds("block", (2, 3), 16, {"fp8": "e4m3"}),
    "mxfp8": Fp8RecipeNeeds("mx", (2, 1), 32, {"fp8": "e4m3"}),
    "delayed": Fp8RecipeNeeds(
        "tensor",
        (2, 1),
        16,
        # Scales of the largest values that were seen, which Megatron's default would take from the last step alone.
        {"fp8": "hybrid", "fp8_margin": 0, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"},
    ),
}


def fp8_layer_settings(
    recipe: Fp8Recipe,
    layout: ParallelLayout,
    transformer_engine: bool,  # whether the layers are its
    *,
    num_layers: int,  # of the whole model
    has_experts: bool,
    num_bf16_ends: int,
) -> dict[str, Any]:
    """Arguments of TransformerConfig. `num_bf16_ends` layers at the start, and as many at the end, stay in bfloat16.

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
    """Megatron keeps bfloat16 layers within the first and the last stage."""
    most = min(num_layers // pipeline_size, (num_layers - 1) // 2)
    if num_bf16_ends > most:
        raise ValueError(
            f"model.fp8_bf16_ends={num_bf16_ends} must be <= {most}: less than half of {num_layers} layers, "
            f"and those of one of parallel.pipeline={pipeline_size} stages"
        )


def recipe_settings(recipe: Fp8Recipe, *, has_experts: bool = False, num_bf16_ends: int = 0) -> dict[str, Any]:
    settings = {"fp8_recipe": recipe, "fp8_param": False, **RECIPES[recipe].settings}
    if has_experts:
        settings["moe_router_padding_for_quantization"] = True  # each expert's tokens are a product of their own
    if num_bf16_ends:
        settings |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": num_bf16_ends,
            "num_layers_at_end_in_bf16": num_bf16_ends,
        }
    return settings


def fp8_token_multiple(recipe: Fp8Recipe, layout: ParallelLayout) -> int:
    """What the length of every packed micro-batch must be a multiple of (PackingPlan.token_multiple)."""
    return RECIPES[recipe].token_multiple * (layout.tensor_size if layout.sequence_parallel else 1)
