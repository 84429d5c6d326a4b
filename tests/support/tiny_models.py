"""Writes random models of transformers, and makes batches for them; tiny_checkpoints.py works without transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2ForCausalLM

from examples.tiny_model import TINY_SHAPE
from megatron_oreal.types import TrainingSequence

VOCAB_SIZE = 53  # odd, so that tensor parallelism needs padding

Fill = Callable[[PreTrainedModel], None]  # changes the random weights that transformers made


def fill_apart(model: PreTrainedModel) -> None:
    """Makes norms and biases random too, so that tests detect swapped ones; matrices keep a common scale."""
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.uniform_(0.5, 1.5) if parameter.mean() == 1 else parameter.normal_(std=0.2)
        else:
            parameter.normal_(std=0.1)


def add_noise(model: PreTrainedModel) -> None:
    """Makes norms and biases random too, and all weights so large that the distributions are far from uniform."""
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape))


def keep(_model: PreTrainedModel) -> None:
    """Keeps the random weights of transformers, with which all tokens are about equally likely."""


def write_tiny_model(
    path: Path,
    tied: bool,
    num_layers: int = 4,
    seed: int = 0,
    fill: Fill = fill_apart,
    model_class: type[PreTrainedModel] = Qwen2ForCausalLM,
    **changes: Any,
) -> Path:
    """Writes a model, with `seed` and `fill` for the weights and `changes` to config.json, and returns its folder."""
    shape = TINY_SHAPE | {"vocab_size": VOCAB_SIZE, "eos_token_id": 1}
    settings = shape | {"tie_word_embeddings": tied, "num_hidden_layers": num_layers} | changes
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**settings))  # type: ignore[misc]
    with torch.no_grad():
        fill(model)
    model.save_pretrained(path)
    return path


def random_sequences(count: int, seed: int = 0, longest: int = 20) -> list[TrainingSequence]:
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    return [
        TrainingSequence(
            prompt_ids=tokens(2, 8),
            response_ids=(response := tokens(1, longest)),
            advantage=rng.uniform(0.5, 2.0) * (1 if number % 2 == 0 else -1),
            is_correct=number % 2 == 0,
            model_logprobs=[-rng.random() for _ in response],
        )
        for number in range(count)
    ]
