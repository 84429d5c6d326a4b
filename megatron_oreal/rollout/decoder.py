"""A lean decoder for Llama-like models: the fused projections, a growing key-value cache, and nothing else.

Small models are bound by the number of operations a token; transformers' general forward pass spends about twice the
time (tools/bench_local_engine.py). The architecture is RMSNorm, rotary positions in halves, grouped-query attention with
optional biases on queries, keys and values, and SwiGLU. Prompts are padded on the left: all rows share a length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.checkpoint.families import Architecture

LLAMA_LIKE = ("qwen2", "llama")  # families whose layers are exactly these
PREFILL_TOKENS = 16384  # padding included, of prompts that go through the layers together
MIN_CACHE_GROWTH = 64  # tokens

# (layer, queries [B, L, heads, D], keys [B, L, kv_heads, D], values like keys) -> [B, L, heads * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True, frozen=True)
class Layer:
    attention_norm: Tensor  # [H]
    qkv_weight: Tensor  # [(heads + 2 * kv_heads) * D, H]
    qkv_bias: Tensor | None  # [(heads + 2 * kv_heads) * D]
    output_weight: Tensor  # [H, heads * D]
    mlp_norm: Tensor  # [H]
    gate_up_weight: Tensor  # [2 * intermediate, H]
    down_weight: Tensor  # [H, intermediate]


class LlamaDecoder:
    """Weights and forward pass; `parameters` are writable views by Hugging Face name, uninitialised at first."""

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        self.architecture, self.device, self.dtype = architecture, device, dtype
        self.vocab_size = architecture.vocab_size
        self.embedding = self._empty(architecture.vocab_size, architecture.hidden_size)
        self.final_norm = self._empty(architecture.hidden_size)
        self.parameters: dict[str, Tensor] = {"model.embed_tokens.weight": self.embedding}
        self.layers = [self._make_layer(f"model.layers.{index}.") for index in range(architecture.num_layers)]
        self.parameters["model.norm.weight"] = self.final_norm
        self.output_weight = self.embedding
        if not architecture.tied_embeddings:
            self.output_weight = self._empty(architecture.vocab_size, architecture.hidden_size)
            self.parameters["lm_head.weight"] = self.output_weight
        self.cos = self.signed_sin = self._empty(0, architecture.head_dim)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def _make_layer(self, prefix: str) -> Layer:
        shape = self.architecture
        query_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        layer = Layer(
            attention_norm=self._empty(shape.hidden_size),
            qkv_weight=self._empty(query_size + 2 * kv_size, shape.hidden_size),
            qkv_bias=self._empty(query_size + 2 * kv_size) if shape.qkv_bias else None,
            output_weight=self._empty(shape.hidden_size, query_size),
            mlp_norm=self._empty(shape.hidden_size),
            gate_up_weight=self._empty(2 * shape.intermediate_size, shape.hidden_size),
            down_weight=self._empty(shape.hidden_size, shape.intermediate_size),
        )
        named = {
            "input_layernorm.weight": layer.attention_norm,
            "self_attn.o_proj.weight": layer.output_weight,
            "post_attention_layernorm.weight": layer.mlp_norm,
            "mlp.down_proj.weight": layer.down_weight,
        }
        for name, part in zip("qkv", layer.qkv_weight.split([query_size, kv_size, kv_size]), strict=True):
            named[f"self_attn.{name}_proj.weight"] = part
        if layer.qkv_bias is not None:
            for name, part in zip("qkv", layer.qkv_bias.split([query_size, kv_size, kv_size]), strict=True):
                named[f"self_attn.{name}_proj.bias"] = part
        for name, part in zip(("gate", "up"), layer.gate_up_weight.chunk(2), strict=True):
            named[f"mlp.{name}_proj.weight"] = part
        self.parameters |= {prefix + name: tensor for name, tensor in named.items()}
        return layer

    def ensure_positions(self, num_positions: int) -> None:
        """Rotary tables of at least `num_positions` rows: cos and (-sin, sin), [positions, D]."""
        if num_positions <= len(self.cos):
            return
        head_dim = self.architecture.head_dim
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=self.device) / head_dim
        positions = torch.arange(2 * num_positions, dtype=torch.float32, device=self.device)
        angles = positions[:, None] / self.architecture.rope_theta**exponents  # [positions, D / 2]
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(self.dtype)
        self.signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(self.dtype)

    def forward(self, token_ids: Tensor, cos: Tensor, signed_sin: Tensor, attend: Attend) -> Tensor:
        """Logits [B, V] after the last of token_ids [B, L]. cos, signed_sin: broadcast against [B, L, heads, D]."""
        eps, head_dim = self.architecture.norm_eps, self.architecture.head_dim
        num_heads, num_kv_heads = self.architecture.num_heads, self.architecture.num_kv_heads
        hidden_shape = (self.architecture.hidden_size,)
        hidden = F.embedding(token_ids, self.embedding)  # [B, L, H]
        for index, layer in enumerate(self.layers):
            normed = F.rms_norm(hidden, hidden_shape, layer.attention_norm, eps)
            qkv = F.linear(normed, layer.qkv_weight, layer.qkv_bias).unflatten(-1, (-1, head_dim))
            query_key, values = qkv.split([num_heads + num_kv_heads, num_kv_heads], dim=2)
            first, second = query_key.chunk(2, dim=-1)
            turned = torch.cat((second, first), dim=-1).mul_(signed_sin).addcmul_(query_key, cos)
            queries, keys = turned.split([num_heads, num_kv_heads], dim=2)
            hidden += F.linear(attend(index, queries, keys, values), layer.output_weight)
            normed = F.rms_norm(hidden, hidden_shape, layer.mlp_norm, eps)
            gate, up = F.linear(normed, layer.gate_up_weight).chunk(2, dim=-1)
            hidden += F.linear(F.silu(gate).mul_(up), layer.down_weight)
        return F.linear(F.rms_norm(hidden[:, -1], hidden_shape, self.final_norm, eps), self.output_weight)

    @torch.inference_mode()
    def start(self, prompt_ids: Tensor, num_padding: Tensor, prompt_of_row: Tensor) -> tuple[Tensor, LlamaDecoding]:
        """Logits [B, V] of the first response token, and what decodes the next ones.

        prompt_ids: [U, P] padded on the left. num_padding: [U]. prompt_of_row: [B], indices into [U]: each prompt goes
        through the layers once, whatever the number of its rows.
        """
        num_prompts, length = prompt_ids.shape
        decoding = LlamaDecoding(self, num_padding[prompt_of_row], length, bool(num_padding.any()))
        logits = []
        prompts_together = max(1, PREFILL_TOKENS // length)
        for begin in range(0, num_prompts, prompts_together):
            part = slice(begin, min(begin + prompts_together, num_prompts))
            rows = ((prompt_of_row >= part.start) & (prompt_of_row < part.stop)).nonzero()[:, 0]
            logits.append(decoding.prefill(prompt_ids[part], num_padding[part], rows, prompt_of_row[rows] - begin))
        return torch.cat(logits)[prompt_of_row], decoding


class LlamaDecoding:
    """Rows that are decoded together, with their keys and values: [B, kv_heads, capacity, D] a layer."""

    def __init__(self, decoder: LlamaDecoder, num_padding: Tensor, length: int, is_padded: bool) -> None:
        self.decoder, self.num_padding, self.length, self.is_padded = decoder, num_padding, length, is_padded
        shape = decoder.architecture
        self.capacity = length + MIN_CACHE_GROWTH
        cache_shape = (len(num_padding), shape.num_kv_heads, self.capacity, shape.head_dim)
        self.keys = [decoder._empty(*cache_shape) for _ in decoder.layers]
        self.values = [decoder._empty(*cache_shape) for _ in decoder.layers]
        decoder.ensure_positions(self.capacity)

    def prefill(self, prompt_ids: Tensor, num_padding: Tensor, rows: Tensor, prompt_of_row: Tensor) -> Tensor:
        """Logits [U, V] after the prompts [U, P]; fills the cache of `rows` [B'], which have prompts `prompt_of_row`."""
        decoder, length = self.decoder, self.length
        queries_per_key = decoder.architecture.num_heads // decoder.architecture.num_kv_heads
        columns = torch.arange(length, device=prompt_ids.device)
        positions = (columns - num_padding[:, None]).clamp_(min=0)  # [U, P]
        mask = None
        if self.is_padded:
            is_token = columns >= num_padding[:, None]
            # Padding attends to itself: a row without any key would be NaN, and stay so in the next layer's values.
            causal = columns <= columns[:, None]
            itself = columns == columns[:, None]
            mask = ((is_token[:, None] & causal) | itself)[:, None]  # [U, 1, P, P]

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            self.keys[index][rows, :, :length] = keys[prompt_of_row]
            self.values[index][rows, :, :length] = values[prompt_of_row]
            if queries_per_key > 1:
                keys = keys.repeat_interleave(queries_per_key, dim=1)
                values = values.repeat_interleave(queries_per_key, dim=1)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
            return mixed.transpose(1, 2).flatten(2)

        cos, signed_sin = decoder.cos[positions][:, :, None], decoder.signed_sin[positions][:, :, None]
        return decoder.forward(prompt_ids, cos, signed_sin, attend)

    @torch.inference_mode()
    def advance(self, token_ids: Tensor) -> Tensor:
        """Appends token_ids [B]; the logits [B, V] of the next ones."""
        if self.length == self.capacity:
            self._grow()
        decoder, column, filled = self.decoder, self.length, self.length + 1
        shape = decoder.architecture
        grouped = (shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim)
        cos, signed_sin, mask = decoder.cos[column], decoder.signed_sin[column], None
        if self.is_padded:
            positions = column - self.num_padding
            cos, signed_sin = decoder.cos[positions][:, None, None], decoder.signed_sin[positions][:, None, None]
            columns = torch.arange(filled, device=token_ids.device)
            mask = (columns >= self.num_padding[:, None])[:, None, None]  # [B, 1, 1, filled]

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            self.keys[index][:, :, column] = keys[:, 0]
            self.values[index][:, :, column] = values[:, 0]
            # The query heads that share a key head stand in the place of query positions: nothing is repeated.
            mixed = F.scaled_dot_product_attention(
                queries.reshape(-1, *grouped),
                self.keys[index][:, :, :filled],
                self.values[index][:, :, :filled],
                attn_mask=mask,
            )
            return mixed.reshape(len(mixed), 1, -1)

        self.length = filled
        return decoder.forward(token_ids[:, None], cos, signed_sin, attend)

    def _grow(self) -> None:
        growth = max(MIN_CACHE_GROWTH, self.capacity // 2)
        self.capacity += growth
        self.decoder.ensure_positions(self.capacity)
        for cache in (self.keys, self.values):
            for index, old in enumerate(cache):
                cache[index] = F.pad(old, (0, 0, 0, growth))

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows` [B'], indices into [B]."""
        self.num_padding = self.num_padding[rows]
        for cache in (self.keys, self.values):
            for index, old in enumerate(cache):
                cache[index] = old[rows]
