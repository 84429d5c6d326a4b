"""Tiny random models on disk."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 24,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def save_model(model: PreTrainedModel, path: Path) -> Path:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases and norms too, and large enough that the distributions are far from uniform.
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="session")
def untied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False))
    return save_model(model, tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    return save_model(model, tmp_path_factory.mktemp("llama"))
