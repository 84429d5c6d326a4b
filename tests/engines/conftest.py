"""Tiny random models on disk, whose responses have no end token of their own."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.support.tiny_models import add_noise, write_tiny_model

SHAPE: dict[str, Any] = {
    "vocab_size": 24,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "num_layers": 2,
    "seed": 7,
    "fill": add_noise,
}


@pytest.fixture(scope="session")
def tied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tied"), tied=True, **SHAPE)


@pytest.fixture(scope="session")
def untied_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("untied"), tied=False, **SHAPE)


@pytest.fixture(scope="session")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), tied=False, model_class=LlamaForCausalLM, **SHAPE)
