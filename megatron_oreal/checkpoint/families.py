"""One entry a model family: its architecture, read from config.json, and its parameter table. Imports no megatron.

To add a family, add a function that reads its config.json, a function that gives its rows, and a line in FAMILIES.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oreal.checkpoint.mapping import Direct, GateUp, Qkv, Row

Head = Literal["lm", "scalar"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """What building the model takes, in Hugging Face's terms."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    qkv_bias: bool
    tied_embeddings: bool


@dataclass(frozen=True, slots=True)
class Family:
    read: Callable[[dict[str, Any]], Architecture]
    rows: Callable[[Architecture, Head], list[Row]]


def read_architecture(path: Path) -> Architecture:
    """Raises ValueError for an unknown model_type and for settings that would be carried over wrongly."""
    settings = json.loads((path / "config.json").read_text())
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model.path: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    return FAMILIES[model_type].read(settings)


def parameter_rows(architecture: Architecture, head: Head) -> list[Row]:
    return FAMILIES[architecture.family].rows(architecture, head)


def read_qwen2(settings: dict[str, Any]) -> Architecture:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type != "default":
        raise ValueError(f"model.path: rope type {rope_type!r} is not supported for qwen2; only 'default' is")
    if settings.get("use_sliding_window"):
        raise ValueError("model.path: sliding-window attention is not supported; set use_sliding_window to false")
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"model.path: hidden_act {settings['hidden_act']!r} is not supported; only 'silu' is")
    heads = settings["num_attention_heads"]
    return Architecture(
        family="qwen2",
        num_layers=settings["num_hidden_layers"],
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["intermediate_size"],
        num_heads=heads,
        num_kv_heads=settings.get("num_key_value_heads", heads),
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        vocab_size=settings["vocab_size"],
        max_positions=settings.get("max_position_embeddings", 32768),
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or settings.get("rope_theta", 10000.0)),
        qkv_bias=True,
        tied_embeddings=settings.get("tie_word_embeddings", False),
    )


def qwen2_rows(architecture: Architecture, head: Head) -> list[Row]:
    qkv = Qkv(architecture.num_heads // architecture.num_kv_heads, architecture.head_dim)
    layer, hf_layer = "decoder.layers.{layer}.", "model.layers.{layer}."

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{hf_layer}self_attn.{name}_proj.{kind}" for name in "qkv")

    rows = [
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Direct(axis=0), pads_vocabulary=True),
        Row(layer + "input_layernorm.weight", (hf_layer + "input_layernorm.weight",), Direct()),
        Row(layer + "self_attention.linear_qkv.weight", projections("weight"), qkv),
        Row(layer + "self_attention.linear_qkv.bias", projections("bias"), qkv),
        Row(layer + "self_attention.linear_proj.weight", (hf_layer + "self_attn.o_proj.weight",), Direct(axis=1)),
        Row(layer + "pre_mlp_layernorm.weight", (hf_layer + "post_attention_layernorm.weight",), Direct()),
        Row(
            layer + "mlp.linear_fc1.weight",
            (hf_layer + "mlp.gate_proj.weight", hf_layer + "mlp.up_proj.weight"),
            GateUp(),
        ),
        Row(layer + "mlp.linear_fc2.weight", (hf_layer + "mlp.down_proj.weight",), Direct(axis=1)),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Direct()),
    ]
    return [*rows, head_row(architecture, head)]


def head_row(architecture: Architecture, head: Head) -> Row:
    if head == "scalar":
        return Row("output_layer.weight", ("score.weight",), Direct())
    tied = architecture.tied_embeddings
    hf_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    return Row("output_layer.weight", (hf_name,), Direct(axis=0), pads_vocabulary=True, exported=not tied)


# Transformer Engine's layers hold the norm inside the linear that follows it.
TRANSFORMER_ENGINE_ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def canonical_name(megatron_name: str) -> str:
    for alias, name in TRANSFORMER_ENGINE_ALIASES.items():
        megatron_name = megatron_name.replace(alias, name)
    return megatron_name


FAMILIES: dict[str, Family] = {
    "qwen2": Family(read_qwen2, qwen2_rows),
}
