"""Random models that are small enough for a CPU: the examples, the benchmarks and the tests build theirs here."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

# Settings of config.json, which every Llama-like family knows. Whoever builds a model changes what matters to it.
TINY_SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "dtype": "float32",
}


def tiny_config(**changes: Any) -> Qwen2Config:
    """Returns a Qwen2 configuration of TINY_SHAPE with these settings changed, e.g. `vocab_size=20, eos_token_id=2`."""
    return Qwen2Config(**TINY_SHAPE | changes)


def write_random_model(folder: Path, config: Qwen2Config, seed: int, scales_residuals: bool = False) -> int:
    """Writes a model of this configuration whose weights the seed decides; returns its number of parameters.

    Matrices have the standard deviation `config.initializer_range`, biases are 0 and norms are 1. With
    `scales_residuals`, the matrices that add to the residual stream start smaller the deeper the model is.
    """
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    residual_std = config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if scales_residuals else 1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1.0 if "norm" in name else 0.0)
            else:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = residual_std if is_residual else config.initializer_range
                parameter.normal_(std=std, generator=generator)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def prepare_or_exit(prepare: Callable[[], str]) -> None:
    """Runs what an example's prepare.py does and prints what it made; a user's mistake is one line and exit code 2."""
    transformers_logging.disable_progress_bar()
    try:
        click.echo(prepare())
    except (ValueError, OSError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
