"""Holds the table of model families. An entry reads the family's config.json and lists its parameters.

To add a family, add a function that reads its config.json, a function that gives its rows, and a line in FAMILIES; see
README.md in this folder. The module imports neither megatron nor torch: the command line asks it which models can be
trained, on machines that have neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oreal.config.model_files import ModelSettings, read_model_settings
from megatron_oreal.weights.mapping import Direct, GateUp, Place, Qkv, Row, places
from megatron_oreal.weights.rotary import Llama3Scaling, read_rotary

HeadKind = Literal["lm", "scalar"]  # a language model's output layer, or one number for each token


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts that every layer has; a softmax routes the tokens."""

    count: int
    num_per_token: int
    intermediate_size: int
    weights_sum_to_one: bool  # False: a chosen expert keeps its share of the softmax over all experts


@dataclass(frozen=True, slots=True)
class Architecture:
    """The settings that building the model needs, in Hugging Face's terms."""

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
    qk_norm: bool = False  # RMSNorm over each query and key head
    rope_scaling: Llama3Scaling | None = None
    experts: Experts | None = None

    @property
    def num_experts(self) -> int:
        return self.experts.count if self.experts else 0


@dataclass(frozen=True, slots=True)
class Family:
    read: Callable[[ModelSettings], Architecture]
    rows: Callable[[Architecture, HeadKind], list[Row]]
    # The decoder of the local engine: its own, for layers that are exactly Llama's or Qwen2's, or the model of
    # transformers. None: checkpoints of the family can be converted, but not trained.
    decoder: Literal["llama", "transformers"] | None = None


def read_architecture(path: Path) -> Architecture:
    """Reads the architecture from `path`/config.json.

    Raises ValueError for an unknown model_type and for settings that would be carried over wrongly.
    """
    settings = read_model_settings(path)
    model_type = settings.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model.path: model_type {model_type!r} is not supported; known: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[model_type].read(settings)
    except KeyError as error:
        raise ValueError(f"model.path: {path / 'config.json'} lacks {error}; give the model's own") from None
    except (TypeError, AttributeError, ZeroDivisionError) as error:  # a setting is of the wrong type, or zero
        raise ValueError(f"model.path: {path / 'config.json'}: {error}; give the model's own") from None


def trainable_families() -> list[str]:
    """Returns the model types that can be trained and evaluated, because the local engine can generate with them."""
    return [model_type for model_type, family in FAMILIES.items() if family.decoder is not None]


def parameter_rows(architecture: Architecture, head: HeadKind) -> list[Row]:
    return FAMILIES[architecture.family].rows(architecture, head)


def parameters(architecture: Architecture, head: HeadKind) -> Iterator[tuple[Row, Place]]:
    """Yields every parameter of the whole model."""
    for row in parameter_rows(architecture, head):
        for place in places(row, architecture.num_layers, architecture.num_experts):
            yield row, place


# ---- config.json ----------------------------------------------------------------------------------------------------


# In these families every attention head has its own key and value if config.json does not name their number. For the
# others transformers would assume a fixed number, so their config.json must name it.
KV_HEADS_LIKE_HEADS: ModelSettings = {"num_key_value_heads": None}


def read_common(settings: ModelSettings, family: str, **family_settings: Any) -> Architecture:
    """Reads the settings that all families name alike; `family_settings` are the other fields of Architecture."""
    refuse(settings, "quantization_config")  # the weights would be read without their scales
    if settings.get("hidden_act", "silu") != "silu":
        raise ValueError(f"model.path: hidden_act {settings['hidden_act']!r} is not supported; only 'silu' is")
    heads = settings["num_attention_heads"]
    rope_theta, rope_scaling = read_rotary(settings, family)
    fields: dict[str, Any] = {
        "family": family,
        "num_layers": settings["num_hidden_layers"],
        "hidden_size": settings["hidden_size"],
        "intermediate_size": settings["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": settings["num_key_value_heads"] or heads,
        "head_dim": settings.get("head_dim") or settings["hidden_size"] // heads,
        "vocab_size": settings["vocab_size"],
        "max_positions": settings.get("max_position_embeddings", 32768),
        "norm_eps": settings.get("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "qkv_bias": False,
        "tied_embeddings": settings.get("tie_word_embeddings", False),
    }
    return Architecture(**fields | family_settings)


def refuse(settings: ModelSettings, *names: str) -> None:
    """Raises ValueError for a setting that is not absent, null or false."""
    for name in names:
        if settings.get(name):
            raise ValueError(f"model.path: {name}={settings[name]!r} is not supported; only without it")


def refuse_sliding_window(settings: ModelSettings) -> None:
    """Raises an error for an active window: the Qwen families name its size even if another setting turns it off."""
    if settings.get("use_sliding_window") or "sliding_attention" in (settings.get("layer_types") or []):
        raise ValueError("model.path: sliding-window attention is not supported; set use_sliding_window to false")


def read_qwen2(settings: ModelSettings) -> Architecture:
    refuse_sliding_window(settings)
    return read_common(settings, "qwen2", qkv_bias=True)


def read_qwen3(
    settings: ModelSettings, family: str = "qwen3", default_head_dim: int = 128, **more: Any
) -> Architecture:
    refuse_sliding_window(settings)
    refuse(settings, "attention_bias")
    head_dim = settings.get("head_dim") or default_head_dim
    return read_common(settings, family, qk_norm=True, head_dim=head_dim, **more)


def read_qwen3_moe(settings: ModelSettings) -> Architecture:
    refuse(settings, "mlp_only_layers")
    if settings.get("decoder_sparse_step", 1) != 1:
        raise ValueError("model.path: decoder_sparse_step must be 1: layers without experts are not supported")
    experts = Experts(
        count=settings.get("num_experts") or settings["num_local_experts"],
        num_per_token=settings["num_experts_per_tok"],
        intermediate_size=settings["moe_intermediate_size"],
        weights_sum_to_one=settings.get("norm_topk_prob", False),
    )
    # Unlike in qwen3, head_dim is hidden_size / heads if config.json does not name it.
    default_head_dim = settings["hidden_size"] // settings["num_attention_heads"]
    return read_qwen3(settings, "qwen3_moe", default_head_dim, experts=experts)


def read_llama(settings: ModelSettings) -> Architecture:
    refuse(settings, "attention_bias", "mlp_bias")
    return read_common(KV_HEADS_LIKE_HEADS | settings, "llama")


def read_mistral(settings: ModelSettings) -> Architecture:
    # transformers assumes 4096 if config.json does not name it.
    if settings.get("sliding_window", 4096):
        raise ValueError("model.path: sliding-window attention is not supported; set sliding_window to null")
    return read_common(settings, "mistral")


def read_internlm2(settings: ModelSettings) -> Architecture:
    refuse(settings, "bias")
    return read_common(KV_HEADS_LIKE_HEADS | settings, "internlm2")


def read_internlm3(settings: ModelSettings) -> Architecture:
    refuse(settings, "bias")  # of the output projection and the MLP
    return read_common(settings, "internlm3", qkv_bias=settings.get("qkv_bias", False))


# ---- parameters -----------------------------------------------------------------------------------------------------

LAYER, HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def llama_rows(architecture: Architecture, head: HeadKind) -> list[Row]:
    """Lists Llama's names, and those of what the architecture has besides: biases, norms of q and k, experts."""
    return [
        *outer_rows(architecture, head, "model.embed_tokens.weight", "lm_head.weight"),
        *llama_attention_rows(architecture),
        *(expert_rows(architecture, architecture.experts) if architecture.experts else llama_mlp_rows(architecture)),
    ]


def llama_attention_rows(architecture: Architecture) -> list[Row]:
    hidden, head_dim = architecture.hidden_size, architecture.head_dim
    qkv = Qkv(architecture.num_heads // architecture.num_kv_heads, head_dim)
    query_size, qkv_size = attention_sizes(architecture)

    def projections(kind: str) -> tuple[str, ...]:
        return tuple(f"{HF_LAYER}self_attn.{name}_proj.{kind}" for name in "qkv")

    rows = [
        Row(LAYER + "input_layernorm.weight", (HF_LAYER + "input_layernorm.weight",), Direct(), (hidden,)),
        Row(LAYER + "self_attention.linear_qkv.weight", projections("weight"), qkv, (qkv_size, hidden)),
        Row(
            LAYER + "self_attention.linear_proj.weight",
            (HF_LAYER + "self_attn.o_proj.weight",),
            Direct(axis=1),
            (hidden, query_size),
        ),
        Row(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "post_attention_layernorm.weight",), Direct(), (hidden,)),
    ]
    if architecture.qkv_bias:
        rows.append(Row(LAYER + "self_attention.linear_qkv.bias", projections("bias"), qkv, (qkv_size,)))
    for name in "qk" if architecture.qk_norm else "":
        megatron, hf = f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight"
        rows.append(Row(LAYER + megatron, (HF_LAYER + hf,), Direct(), (head_dim,)))
    return rows


def llama_mlp_rows(architecture: Architecture) -> list[Row]:
    names = tuple(f"{HF_LAYER}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
    return mlp_rows("mlp.", names, architecture.hidden_size, architecture.intermediate_size)


def expert_rows(architecture: Architecture, experts: Experts) -> list[Row]:
    names = tuple(f"{HF_LAYER}mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    router = (HF_LAYER + "mlp.gate.weight",)
    hidden = architecture.hidden_size
    return [
        Row(LAYER + "mlp.router.weight", router, Direct(), (experts.count, hidden)),
        *mlp_rows("mlp.experts.local_experts.{expert}.", names, hidden, experts.intermediate_size),
    ]


def internlm2_rows(architecture: Architecture, head: HeadKind) -> list[Row]:
    hidden = architecture.hidden_size
    query_size, qkv_size = attention_sizes(architecture)
    attention, mlp = HF_LAYER + "attention.", HF_LAYER + "feed_forward."
    return [
        *outer_rows(architecture, head, "model.tok_embeddings.weight", "output.weight"),
        Row(LAYER + "input_layernorm.weight", (HF_LAYER + "attention_norm.weight",), Direct(), (hidden,)),
        # wqkv holds q, k and v by key/value group, as Megatron does.
        Row(
            LAYER + "self_attention.linear_qkv.weight", (attention + "wqkv.weight",), Direct(axis=0), (qkv_size, hidden)
        ),
        Row(
            LAYER + "self_attention.linear_proj.weight",
            (attention + "wo.weight",),
            Direct(axis=1),
            (hidden, query_size),
        ),
        Row(LAYER + "pre_mlp_layernorm.weight", (HF_LAYER + "ffn_norm.weight",), Direct(), (hidden,)),
        *mlp_rows(
            "mlp.", (mlp + "w1.weight", mlp + "w3.weight", mlp + "w2.weight"), hidden, architecture.intermediate_size
        ),
    ]


def attention_sizes(architecture: Architecture) -> tuple[int, int]:
    """Returns the rows of the queries alone, and those of queries, keys and values together."""
    query_size = architecture.num_heads * architecture.head_dim
    return query_size, query_size + 2 * architecture.num_kv_heads * architecture.head_dim


def mlp_rows(prefix: str, gate_up_down: tuple[str, ...], hidden_size: int, intermediate_size: int) -> list[Row]:
    gate, up, down = gate_up_down
    fc1, fc2 = f"{LAYER}{prefix}linear_fc1.weight", f"{LAYER}{prefix}linear_fc2.weight"
    return [
        Row(fc1, (gate, up), GateUp(), (2 * intermediate_size, hidden_size)),
        Row(fc2, (down,), Direct(axis=1), (hidden_size, intermediate_size)),
    ]


def outer_rows(architecture: Architecture, head: HeadKind, embedding: str, output: str) -> list[Row]:
    """Lists what is outside of the layers. The head of a sequence classifier is `score.weight` in every family."""
    hidden, whole = architecture.hidden_size, (architecture.vocab_size, architecture.hidden_size)
    rows = [
        Row("embedding.word_embeddings.weight", (embedding,), Direct(axis=0), whole, pads_vocabulary=True),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Direct(), (hidden,)),
    ]
    if head == "scalar":
        return [*rows, Row("output_layer.weight", ("score.weight",), Direct(), (1, hidden))]
    tied = architecture.tied_embeddings
    source = embedding if tied else output
    return [
        *rows,
        Row("output_layer.weight", (source,), Direct(axis=0), whole, pads_vocabulary=True, exported=not tied),
    ]


# Transformer Engine's layers hold the norm inside the linear that follows it.
TRANSFORMER_ENGINE_ALIASES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def canonical_name(megatron_name: str) -> str:
    """Returns the name that the tables use for a parameter of Megatron."""
    for alias, name in TRANSFORMER_ENGINE_ALIASES.items():
        megatron_name = megatron_name.replace(alias, name)
    return megatron_name


# model_type of config.json -> family
FAMILIES: dict[str, Family] = {
    "qwen2": Family(read_qwen2, llama_rows, decoder="llama"),
    "qwen3": Family(read_qwen3, llama_rows, decoder="transformers"),
    "qwen3_moe": Family(read_qwen3_moe, llama_rows),
    "llama": Family(read_llama, llama_rows, decoder="llama"),
    "mistral": Family(read_mistral, llama_rows, decoder="transformers"),
    "internlm2": Family(read_internlm2, internlm2_rows),
    "internlm3": Family(read_internlm3, llama_rows),
}
