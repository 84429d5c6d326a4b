"""Tiny random checkpoints and batches for the tests of models and algorithms."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_oreal.types import TrainingSequence

VOCAB_SIZE = 53  # odd: padded under tensor parallelism


def write_tiny_model(path: Path, tied: bool, num_layers: int = 4, seed: int = 0) -> Path:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights and biases are random too: a swapped one must show.
            if parameter.dim() < 2:
                parameter.uniform_(0.5, 1.5) if parameter.mean() == 1 else parameter.normal_(std=0.2)
            else:
                parameter.normal_(std=0.1)
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
