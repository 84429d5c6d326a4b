"""Writes tiny Hugging Face directories of every family, with random tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_oreal.weights.families import FAMILIES, HeadKind, parameters, read_architecture

COMMON = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 53,  # odd, so that tensor parallelism needs padding
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": None,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,  # less than the length of the tests' sequences, so that it has an effect
}
# The tests cover every family; a new one gets COMMON alone. Settings of single families are added here.
MODELS: dict[str, dict[str, Any]] = {model_type: {"model_type": model_type} for model_type in FAMILIES} | {
    "qwen2": {"model_type": "qwen2", "rope_theta": 1e6},
    "qwen2-tied": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e6},
    "llama": {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
    "llama-plain": {"model_type": "llama"},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None, "rope_theta": 1e6},
    "internlm2": {"model_type": "internlm2", "rope_theta": 1e6, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "internlm3": {"model_type": "internlm3", "rope_theta": 5e7, "head_dim": 8, "qkv_bias": True, "bias": False},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
}


def random_tensors(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        # Norm weights and biases are random too, so that tests detect swapped ones.
        name: (torch.randn(shape, generator=generator) * 0.1 + ("norm" in name)).to(dtype)
        for name, shape in shapes.items()
    }


def hf_shapes(path: Path, head: HeadKind = "lm") -> dict[str, tuple[int, ...]]:
    rows = [(row, place) for row, place in parameters(read_architecture(path), head) if row.exported]
    return {
        name: shape for row, place in rows for name, shape in zip(row.hf_names(place), row.hf_shapes(), strict=True)
    }


def write_checkpoint(
    path: Path,
    model: str,
    dtype: torch.dtype = torch.float32,
    head: HeadKind = "lm",
    num_files: int = 2,
    **changes: Any,
) -> Path:
    """Writes a directory with config.json, weights in `num_files` files with their index, and a tokenizer's file."""
    path.mkdir(parents=True)
    settings = COMMON | MODELS[model] | {"torch_dtype": str(dtype).removeprefix("torch.")} | changes
    (path / "config.json").write_text(json.dumps(settings, indent=2))
    (path / "tokenizer_config.json").write_text("{}")
    tensors = random_tensors(hf_shapes(path, head), dtype)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors" if num_files > 1 else "model.safetensors"
        chosen = names[number::num_files]
        save_file({name: tensors[name] for name in chosen}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    if num_files > 1:
        total_size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path
