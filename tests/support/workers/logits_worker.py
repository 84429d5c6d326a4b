"""Compares Megatron's models, loaded from Hugging Face directories, with transformers, in a separate process.

transformers has no InternLM2 and InternLM3, so their weights get the names of a model that computes the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.weights.families import read_architecture
from megatron_oreal.weights.hf_directory import HfReader
from tests.support.tiny_checkpoints import COMMON, MODELS, write_checkpoint

NUM_TOKENS = 40


def main(folder: Path, names: list[str]) -> None:
    transformers_logging.disable_progress_bar()
    layout = parallel.initialize(ParallelConfig(), seed=0)
    ids = torch.randint(0, COMMON["vocab_size"], (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    for name in names:
        path = write_checkpoint(folder / name, name)
        with torch.no_grad():
            expected = reference_model(path, name)(ids).logits
            logits = megatron_logits(path, layout, ids)
        difference = float((logits - expected).abs().max())
        print(f"{name}: {difference:.1e} of {float(expected.abs().max()):.2f}", flush=True)
        assert expected.abs().max() > 0.5 and difference < 1e-4, name
    parallel.finalize()
    print("passed")


def megatron_logits(path: Path, layout: parallel.ParallelLayout, ids: Tensor) -> Tensor:
    architecture = read_architecture(path)
    head = LogprobHead(layout, architecture.vocab_size)
    model = TrainableModel("model", architecture, head, ModelConfig(path=path, dtype="float32"), layout)
    model.load_weights(path)
    chunk = model.chunks[0]
    shared = chunk.share_embeddings_and_output_weights
    weight = chunk.shared_embedding_or_output_weight() if shared else chunk.output_layer.weight
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return chunk(ids, positions, None).transpose(0, 1) @ weight.T


def reference_model(path: Path, name: str) -> Any:
    if not name.startswith("internlm"):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    reader = HfReader(path)
    tensors = {name: reader.read(name, None, 0, 1) for name in reader.file_of}
    settings = COMMON | {"rope_theta": MODELS[name]["rope_theta"]}
    if name == "internlm2":
        config = AutoConfig.for_model("llama", **settings)
        tensors = llama_named(tensors)
    else:
        config = AutoConfig.for_model("qwen2", **settings)  # biases of q, k and v only
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(tensors)
    return model


def llama_named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits InternLM2's wqkv, "(groups, queries a group + 2, head_dim) x hidden": the last two are key and value."""
    renamed = {}
    parts = {
        "tok_embeddings": "embed_tokens", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }  # fmt: skip
    groups, head_dim = COMMON["num_key_value_heads"], COMMON["hidden_size"] // COMMON["num_attention_heads"]
    for name, tensor in tensors.items():
        if name.endswith("wqkv.weight"):
            grouped = tensor.view(groups, -1, head_dim, tensor.shape[1])
            prefix = name.removesuffix("attention.wqkv.weight") + "self_attn."
            for kind, part in (("q", grouped[:, :-2]), ("k", grouped[:, -2]), ("v", grouped[:, -1])):
                renamed[f"{prefix}{kind}_proj.weight"] = part.reshape(-1, tensor.shape[1])
            continue
        new_name = "lm_head.weight" if name == "output.weight" else name
        for old, new in parts.items():
            new_name = new_name.replace(old, new)
        renamed[new_name] = tensor
    return renamed


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
