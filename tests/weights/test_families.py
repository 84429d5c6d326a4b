"""The parameter tables: names, shapes and the way there and back, bit by bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oreal.config.model_files import ModelSettings
from megatron_oreal.weights.families import (
    FAMILIES,
    Architecture,
    Family,
    llama_rows,
    parameters,
    read_architecture,
    read_common,
    trainable_families,
)
from megatron_oreal.weights.mapping import pad_rows, padded_vocabulary, slice_along
from tests.support.tiny_checkpoints import COMMON, MODELS, random_tensors

GROUPED = {"num_key_value_heads": 2, "num_attention_heads": 8, "hidden_size": 48, "head_dim": 6}


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("grouped", [{}, GROUPED], ids=["", "grouped"])
def test_split_undoes_merge_on_every_shard(
    tmp_path: Path, model: str, tensor_size: int, head: Any, grouped: dict[str, int]
) -> None:
    architecture = read_architecture(write_config(tmp_path, COMMON | MODELS[model] | grouped))
    vocabulary = padded_vocabulary(architecture.vocab_size, tensor_size)
    for row, place in parameters(architecture, head):
        names = row.hf_names(place)
        tensors = list(random_tensors(dict(zip(names, row.hf_shapes(), strict=True)), torch.bfloat16).values())
        assert row.op.merge(tensors).shape == row.shape
        padded = [pad_rows(tensor, vocabulary) for tensor in tensors] if row.pads_vocabulary else tensors
        shards = [
            row.op.merge([slice_along(tensor, row.op.axis, rank, tensor_size) for tensor in padded])
            for rank in range(tensor_size)
        ]
        pieces = [row.op.split(shard) for shard in shards]
        for number, tensor in enumerate(tensors):
            axis = row.op.axis
            whole = pieces[0][number] if axis is None else torch.cat([piece[number] for piece in pieces], dim=axis)
            assert torch.equal(whole[: len(tensor)], tensor), names[number]


def llama_names(num_layers: int, per_layer: list[str], output: bool = True) -> list[str]:
    outer = ["model.embed_tokens.weight", "model.norm.weight", *(["lm_head.weight"] if output else [])]
    return outer + [f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in per_layer]


NORMS = ["input_layernorm.weight", "post_attention_layernorm.weight"]
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
BIASES = [f"self_attn.{name}_proj.bias" for name in "qkv"]
QK_NORMS = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
MLP = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
EXPERTS = ["mlp.gate.weight"] + [
    f"mlp.experts.{expert}.{name}_proj.weight" for expert in range(128) for name in ("gate", "up", "down")
]
# As the publishers' config.json say; (settings, names, billions of parameters).
REAL: dict[str, tuple[dict[str, Any], list[str], float]] = {
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "use_sliding_window": False},
        llama_names(28, NORMS + ATTENTION + BIASES + MLP),
        7.616,
    ),
    "Qwen2.5-32B": (
        {"model_type": "qwen2", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 27648,
         "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "use_sliding_window": False},
        llama_names(64, NORMS + ATTENTION + BIASES + MLP),
        32.764,
    ),
    "Qwen3-32B": (
        {"model_type": "qwen3", "num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 25600,
         "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936},
        llama_names(64, NORMS + ATTENTION + QK_NORMS + MLP),
        32.762,
    ),
    "Qwen3-30B-A3B": (
        {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936,
         "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
        llama_names(48, NORMS + ATTENTION + QK_NORMS + EXPERTS),
        30.532,
    ),
    "Llama-3.1-70B": (
        {"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
         "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}},
        llama_names(80, NORMS + ATTENTION + MLP),
        70.554,
    ),
    "InternLM3-8B": (
        {"model_type": "internlm3", "num_hidden_layers": 48, "hidden_size": 4096, "intermediate_size": 10240,
         "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "vocab_size": 128512, "bias": False,
         "qkv_bias": False, "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}},
        llama_names(48, NORMS + ATTENTION + MLP),
        8.804,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_every_name_of_a_real_model_is_used_once_and_produced_once(tmp_path: Path, name: str) -> None:
    settings, expected, billions = REAL[name]
    architecture = read_architecture(write_config(tmp_path, settings))
    rows = list(parameters(architecture, "lm"))
    hf_names = [hf for row, place in rows for hf in row.hf_names(place)]
    assert Counter(hf_names) == Counter(expected)
    megatron_names = [row.megatron_name(place) for row, place in rows]
    assert len(set(megatron_names)) == len(megatron_names)
    num_parameters = sum(torch.Size(row.shape).numel() for row, _ in rows)
    assert num_parameters / 1e9 == pytest.approx(billions, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "known: qwen2, qwen3, qwen3_moe, llama, mistral, internlm2, internlm3"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"model_type": "mistral"}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"model_type": "internlm2", "bias": True}, "bias"),
        ({"model_type": "internlm3", "bias": True}, "bias"),
    ],
)
def test_settings_that_are_not_carried_over_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture(write_config(tmp_path, COMMON | changes))


def test_a_new_family_is_one_line_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(settings: ModelSettings) -> Architecture:
        return read_common(settings, "example", qk_norm=True)

    path = write_config(tmp_path, COMMON | {"model_type": "example"})
    with pytest.raises(ValueError, match=r"^model\.path: model_type 'example' is not supported; known: qwen2, "):
        read_architecture(path)
    monkeypatch.setitem(FAMILIES, "example", Family(read, llama_rows))
    names = [name for row, place in parameters(read_architecture(path), "lm") for name in row.hf_names(place)]
    assert "model.layers.3.self_attn.q_norm.weight" in names
    assert "example" not in trainable_families()
    monkeypatch.setitem(FAMILIES, "example", Family(read, llama_rows, decoder="transformers"))
    assert trainable_families() == ["qwen2", "qwen3", "llama", "mistral", "example"]


@pytest.mark.parametrize("absent", [{}, {"num_key_value_heads": None}])
@pytest.mark.parametrize("model", ["llama", "internlm2"])
def test_llama_has_as_many_key_value_heads_as_heads_where_none_are_named(
    tmp_path: Path, model: str, absent: dict[str, None]
) -> None:
    settings = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"} | MODELS[model] | absent
    assert read_architecture(write_config(tmp_path, settings)).num_kv_heads == COMMON["num_attention_heads"]


@pytest.mark.parametrize("model", ["qwen2", "qwen3", "qwen3_moe", "mistral", "internlm3"])
def test_other_families_must_name_their_key_value_heads(tmp_path: Path, model: str) -> None:
    """There transformers would take its own number for a setting that is absent; null means as many as heads."""
    settings = {name: value for name, value in COMMON.items() if name != "num_key_value_heads"} | MODELS[model]
    with pytest.raises(ValueError, match=r"^model\.path: .*config\.json lacks 'num_key_value_heads'"):
        read_architecture(write_config(tmp_path, settings))
    architecture = read_architecture(write_config(tmp_path, settings | {"num_key_value_heads": None}))
    assert architecture.num_kv_heads == COMMON["num_attention_heads"]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"model_type": "qwen2"}',
        json.dumps(COMMON | {"model_type": "llama", "rope_scaling": [1]}),
        json.dumps(COMMON | {"model_type": "llama", "num_attention_heads": 0}),
    ],
)
def test_a_broken_config_is_a_users_mistake(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"model.path: .*config.json"):
        read_architecture(tmp_path)
