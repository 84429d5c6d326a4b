"""What a config.json leaves out is what transformers takes then, for every family that transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_oreal.weights.families import FAMILIES, Architecture, read_architecture

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 96,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 53,
}
NEEDED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},  # left out, it is a window that is refused
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
KNOWN = ["qwen2", "qwen3", "qwen3_moe", "llama", "mistral"]  # the others are code of their publishers


def read(path: Path, settings: dict[str, Any]) -> Architecture:
    (path / "config.json").write_text(json.dumps(settings))
    return read_architecture(path)


def test_every_family_is_compared_or_named_here() -> None:
    assert {*KNOWN, "internlm2", "internlm3"} == {*FAMILIES}


@pytest.mark.parametrize("family", KNOWN)
def test_what_is_left_out_is_transformers_default(tmp_path: Path, family: str) -> None:
    settings = SIZES | NEEDED.get(family, {})
    architecture = read(tmp_path, settings | {"model_type": family})
    theirs = AutoConfig.for_model(family, **settings)
    head_dim = getattr(theirs, "head_dim", None) or SIZES["hidden_size"] // SIZES["num_attention_heads"]
    assert architecture.norm_eps == theirs.rms_norm_eps
    assert architecture.rope_theta == theirs.rope_parameters["rope_theta"]
    assert architecture.head_dim == head_dim
    assert architecture.num_kv_heads == theirs.num_key_value_heads == 2
    assert architecture.tied_embeddings == theirs.tie_word_embeddings
    # Qwen2 has biases of q, k and v whatever its configuration says; the others have none of any kind.
    assert architecture.qkv_bias == (family == "qwen2") and not getattr(theirs, "attention_bias", False)
    assert architecture.qk_norm == family.startswith("qwen3")
    assert theirs.hidden_act == "silu" and architecture.rope_scaling is None
    assert (architecture.num_layers, architecture.hidden_size, architecture.num_heads) == (3, 96, 6)
    assert (architecture.intermediate_size, architecture.vocab_size, architecture.family) == (80, 53, family)
    if architecture.experts is not None:
        experts = architecture.experts
        assert experts.weights_sum_to_one == theirs.norm_topk_prob
        assert (experts.count, experts.num_per_token, experts.intermediate_size) == (4, 2, 24)
        assert theirs.decoder_sparse_step == 1 and not theirs.mlp_only_layers


@pytest.mark.parametrize("family", KNOWN)
def test_what_is_named_counts(tmp_path: Path, family: str) -> None:
    named = {"rms_norm_eps": 3e-4, "rope_theta": 5e5, "head_dim": 8, "tie_word_embeddings": True}
    named |= {"max_position_embeddings": 77, "norm_topk_prob": True}
    architecture = read(tmp_path, SIZES | NEEDED.get(family, {}) | named | {"model_type": family})
    assert (architecture.norm_eps, architecture.rope_theta, architecture.head_dim) == (3e-4, 5e5, 8)
    assert architecture.tied_embeddings and architecture.max_positions == 77
    if architecture.experts is not None:
        assert architecture.experts.weights_sum_to_one
    inside = named | {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}  # as transformers 5 writes it
    assert read(tmp_path, SIZES | NEEDED.get(family, {}) | inside | {"model_type": family}).rope_theta == 7e5


def test_defaults_of_the_publishers_own_families(tmp_path: Path) -> None:
    for family in ("internlm2", "internlm3"):
        architecture = read(tmp_path, SIZES | {"model_type": family})
        assert (architecture.norm_eps, architecture.rope_theta, architecture.head_dim) == (1e-6, 10000.0, 16)
        assert not architecture.qkv_bias and not architecture.tied_embeddings and not architecture.qk_norm
    assert read(tmp_path, SIZES | {"model_type": "internlm3", "qkv_bias": True}).qkv_bias


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step must be 1"),
        ({"model_type": "qwen3_moe"}, r"lacks 'num_local_experts'"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "sliding-window attention"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, SIZES | changes)
