"""A small decoder for Llama-like models, with fused projections and a growing key-value cache.

The number of operations per step limits the speed of small models. In the same loop, transformers' general forward pass
reaches about 0.5 (8 rows) to 0.8 (512 rows) of the speed (tools/bench/bench_local_engine.py: a 64-wide Qwen2, one CPU
thread). The architecture is RMSNorm, rotary positions in halves, grouped-query attention with optional biases on
queries, keys and values, and SwiGLU. Prompts are padded on the left, so that all rows share a length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_oreal.weights.families import Architecture
from megatron_oreal.weights.rotary import rotary_frequencies

PREFILL_TOKENS = 16384  # including padding, of the prompts in one pass through the layers
MIN_CACHE_GROWTH = 64  # tokens
KEPT_CACHE_ELEMENTS = 2**24  # up to this size a cache stays allocated between calls
CACHE_ALIGNMENT = 16  # tokens; CUDA's fused attention copies masks whose rows do not begin at multiples of it
LOGIT_COPIES = 3  # upper bound of float32 copies of a row's logits at one time when a GPU samples

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
    """Holds weights and forward pass. `parameters` are writable views by Hugging Face name, uninitialised at first."""

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
        self.kept_storage = self._empty(0)

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
        """Makes rotary tables of at least `num_positions` rows: cos and (-sin, sin), [positions, D]."""
        if num_positions <= len(self.cos):
            return
        shape = self.architecture
        frequencies = rotary_frequencies(shape.rope_theta, shape.head_dim, shape.rope_scaling, self.device)
        positions = torch.arange(2 * num_positions, dtype=torch.float32, device=self.device)
        angles = positions[:, None] * frequencies  # [positions, D / 2]
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(self.dtype)
        self.signed_sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(self.dtype)

    def cache_storage(self, num_elements: int) -> Tensor:
        """Returns a flat buffer. Small buffers are reused by the next decoding, because new memory pages are slow."""
        if len(self.kept_storage) < num_elements:
            return self.larger_cache_storage(num_elements)
        return self.kept_storage[:num_elements]

    def larger_cache_storage(self, num_elements: int) -> Tensor:
        """Returns new memory where `cache_storage` might return that of the previous decoding."""
        storage = self._empty(num_elements)
        # CUDA's allocator caches freed memory itself.
        if num_elements <= KEPT_CACHE_ELEMENTS and self.device.type == "cpu":
            self.kept_storage = storage
        return storage

    def forward(self, token_ids: Tensor, cos: Tensor, signed_sin: Tensor, attend: Attend) -> Tensor:
        """Returns logits [B, V] after token_ids [B, L]. cos and signed_sin broadcast against [B, L, heads, D]."""
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
        return self.output_logits(F.rms_norm(hidden[:, -1], hidden_shape, self.final_norm, eps))

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Computes [B, H] -> [B, V], in float32 on CUDA as the trainer does, because bfloat16 would round it."""
        if hidden.is_cuda and hidden.dtype is not torch.float32:
            return torch.mm(hidden, self.output_weight.T, out_dtype=torch.float32)
        return F.linear(hidden, self.output_weight)

    def bytes_of_row(self, num_tokens: int) -> int:
        """Returns the device bytes of one row that is decoded to `num_tokens` tokens, including its prompt."""
        shape, item = self.architecture, self.embedding.element_size()
        cache = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * item * (num_tokens + CACHE_ALIGNMENT)
        growth = 2 * cache // shape.num_layers  # a layer's cache exists twice while it grows
        return cache + growth + LOGIT_COPIES * 4 * shape.vocab_size

    @torch.inference_mode()
    def start(
        self, prompt_ids: Tensor, num_padding: Tensor, prompt_of_row: Tensor, max_length: int | None = None
    ) -> tuple[Tensor, LlamaDecoding]:
        """Returns logits [B, V] of the first response tokens, and the decoding of the next ones; only one is live.

        prompt_ids: [U, P] padded on the left. num_padding: [U]. prompt_of_row: [B], indices into [U]; each prompt
        passes through the layers once for all its rows. max_length: upper bound of a row's tokens, if known.
        """
        num_prompts, length = prompt_ids.shape
        self.ensure_positions(length)
        prompts_together = max(1, PREFILL_TOKENS // length)
        parts = [
            self.prefill(prompt_ids[begin : begin + prompts_together], num_padding[begin : begin + prompts_together])
            for begin in range(0, num_prompts, prompts_together)
        ]
        decoding = LlamaDecoding(self, num_padding[prompt_of_row], length, max_length)
        for index, (keys, values) in enumerate(decoding.layers):
            keys[:, :, :length] = torch.cat([part.keys[index] for part in parts])[prompt_of_row]
            values[:, :, :length] = torch.cat([part.values[index] for part in parts])[prompt_of_row]
        return torch.cat([part.logits for part in parts])[prompt_of_row], decoding

    def prefill(self, prompt_ids: Tensor, num_padding: Tensor) -> Prefilled:
        """Runs the prompts through the layers. prompt_ids: [U, P] padded on the left. num_padding: [U]."""
        queries_per_key = self.architecture.num_heads // self.architecture.num_kv_heads
        columns = torch.arange(prompt_ids.shape[1], device=prompt_ids.device)
        positions = (columns - num_padding[:, None]).clamp_(min=0)  # [U, P]
        mask = None
        if bool(num_padding.any()):
            is_token = columns >= num_padding[:, None]
            # Padding attends to itself. A row without any key would become NaN, and so would the values of the next
            # layer.
            itself = columns == columns[:, None]
            mask = ((is_token[:, None] & (columns <= columns[:, None])) | itself)[:, None]  # [U, 1, P, P]
        all_keys, all_values = [], []

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
            all_keys.append(keys)
            all_values.append(values)
            if queries_per_key > 1:
                keys = keys.repeat_interleave(queries_per_key, dim=1)
                values = values.repeat_interleave(queries_per_key, dim=1)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)
            return mixed.transpose(1, 2).flatten(2)

        cos, signed_sin = self.cos[positions][:, :, None], self.signed_sin[positions][:, :, None]
        logits = self.forward(prompt_ids, cos, signed_sin, attend)
        return Prefilled(logits, all_keys, all_values)


@dataclass(slots=True, frozen=True)
class Prefilled:
    logits: Tensor  # [U, V] after the prompt
    keys: list[Tensor]  # [U, kv_heads, P, D] for each layer
    values: list[Tensor]


class LlamaDecoding:
    """The rows that are decoded together, with their keys and values."""

    def __init__(self, decoder: LlamaDecoder, num_padding: Tensor, length: int, max_length: int | None) -> None:
        self.decoder, self.num_padding, self.length = decoder, num_padding, length
        self.max_length = max_length
        self.is_padded = bool(num_padding.any())
        self.capacity = self._bounded(length + MIN_CACHE_GROWTH)
        if decoder.device.type == "cpu":
            self.layers = self._split(decoder.cache_storage(self._num_elements()))
        else:
            self.layers = [self._new_layer() for _ in range(decoder.architecture.num_layers)]
        decoder.ensure_positions(self.capacity)
        self.padding_mask = self._make_padding_mask()

    def _bounded(self, capacity: int) -> int:
        """Rounds up to a multiple of CACHE_ALIGNMENT on a GPU, but not above the rows' longest length if known."""
        if self.decoder.device.type == "cpu":
            return capacity
        if self.max_length is not None:
            capacity = min(capacity, self.max_length)
        return capacity + -capacity % CACHE_ALIGNMENT

    def _make_padding_mask(self) -> Tensor | None:
        """Makes on a GPU the mask that is added to the scores of all cache columns: [B, 1, 1, capacity], 0 or -inf."""
        if not self.is_padded or self.decoder.device.type == "cpu":
            return None
        columns = torch.arange(self.capacity, device=self.decoder.device)
        mask = torch.zeros(len(self.num_padding), self.capacity, dtype=self.decoder.dtype, device=self.decoder.device)
        return mask.masked_fill_(columns < self.num_padding[:, None], -torch.inf)[:, None, None]

    def _shape(self) -> tuple[int, ...]:
        shape = self.decoder.architecture
        return (shape.num_layers, 2, len(self.num_padding), shape.num_kv_heads, self.capacity, shape.head_dim)

    def _num_elements(self) -> int:
        return torch.Size(self._shape()).numel()

    def _split(self, storage: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Splits the storage into keys and values of every layer, [B, kv_heads, capacity, D]."""
        return [(keys, values) for keys, values in storage.view(self._shape())]

    def _new_layer(self) -> tuple[Tensor, Tensor]:
        keys, values = self.decoder._empty(*self._shape()[1:])
        return keys, values

    @torch.inference_mode()
    def advance(self, token_ids: Tensor) -> Tensor:
        """Appends token_ids [B]; returns the logits [B, V] of the next tokens."""
        if self.length == self.capacity:
            self._grow()
        decoder, column, filled = self.decoder, self.length, self.length + 1
        shape = decoder.architecture
        grouped = (shape.num_kv_heads, shape.num_heads // shape.num_kv_heads, shape.head_dim)
        cos, signed_sin, mask = decoder.cos[column], decoder.signed_sin[column], None
        if self.is_padded:
            positions = column - self.num_padding
            cos, signed_sin = decoder.cos[positions][:, None, None], decoder.signed_sin[positions][:, None, None]
            if self.padding_mask is not None:
                mask = self.padding_mask[..., :filled]
            else:
                columns = torch.arange(filled, device=token_ids.device)
                mask = (columns >= self.num_padding[:, None])[:, None, None]  # [B, 1, 1, filled]

        def attend(index: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            all_keys, all_values = self.layers[index]
            all_keys[:, :, column], all_values[:, :, column] = keys[:, 0], values[:, 0]
            # Query heads that share a key head take the dimension of query positions, so no key is repeated.
            mixed = attend_grouped(
                queries.reshape(-1, *grouped), all_keys[:, :, :filled], all_values[:, :, :filled], mask
            )
            return mixed.reshape(len(mixed), 1, -1)

        self.length = filled
        return decoder.forward(token_ids[:, None], cos, signed_sin, attend)

    def _grow(self) -> None:
        old = self.layers
        self.capacity = self._bounded(self.capacity + max(MIN_CACHE_GROWTH, self.capacity // 2))
        self.decoder.ensure_positions(self.capacity)
        self.padding_mask = self._make_padding_mask()
        if self.decoder.device.type == "cpu":
            self.layers = self._split(self.decoder.larger_cache_storage(self._num_elements()))
        for index, old_layer in enumerate(old):
            if self.decoder.device.type != "cpu":
                old[index] = self._new_layer()  # one layer at a time, so that only one layer's memory exists twice
            for old_cache, cache in zip(old_layer, self.layers[index], strict=True):
                cache[:, :, : self.length] = old_cache[:, :, : self.length]

    @torch.inference_mode()
    def keep(self, rows: Tensor) -> None:
        """Drops all rows except `rows` [B'], rising indices into [B]."""
        self.num_padding = self.num_padding.index_select(0, rows)
        if self.padding_mask is not None:
            self.padding_mask = self.padding_mask.index_select(0, rows)
        for index, layer in enumerate(self.layers):
            for cache in layer:
                cache[: len(rows), :, : self.length] = cache[:, :, : self.length].index_select(0, rows)
            self.layers[index] = (layer[0][: len(rows)], layer[1][: len(rows)])


def attend_grouped(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attends for one token per row: queries [B, kv_heads, heads / kv_heads, D], keys [B, kv_heads, T, D]."""
    if queries.device.type != "cpu":
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    # The fused CPU kernel is designed for many queries; for one query, two batched products need about two thirds of
    # its time.
    scores = torch.matmul(queries, keys.transpose(-1, -2)).mul_(queries.shape[-1] ** -0.5)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return torch.matmul(torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype), values)
