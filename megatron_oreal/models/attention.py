"""Attention over packed sequences with torch alone, and the norm that goes with it.

Megatron's local DotProductAttention refuses packed sequences. Here the segments of a micro-batch are gathered into a
few padded batches of similar length, each one call of scaled_dot_product_attention: exact, without a mask (causality
hides the padding at the end), and with few calls where segments are many and short. On CUDA in half precision, torch's
variable-length attention takes the packed tokens as they are.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

# A padded batch holds segments of at least this share of its longest: the padding is bounded by 1 / share.
SHORTEST_SHARE = 0.6


@dataclass
class PackedSegments(PackedSeqParams):
    """PackedSeqParams for the local layers: "sbhd" keeps Megatron from its per-segment rotary loop."""

    padded_indices: list[Tensor] = field(default_factory=list)  # [segments, longest] int64 into [T], per padded batch
    restore_index: Tensor | None = None  # [T] int64, where token t stands in the concatenated padded batches


def pack_segments(cu_seqlens: Tensor, max_seqlen: int) -> PackedSegments:
    """cu_seqlens [N + 1] int32 of the packed tokens -> what PackedAttention and the rotary embedding need."""
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    padded_indices: list[Tensor] = []
    restore_index = torch.empty(int(cu_seqlens[-1]), dtype=torch.int64, device=cu_seqlens.device)
    offset = 0
    for segments in similar_lengths(lengths.tolist()):
        chosen = torch.tensor(segments, device=cu_seqlens.device)
        longest = int(lengths[chosen].max())
        position = torch.arange(longest, device=cu_seqlens.device)
        within = position < lengths[chosen, None]  # [segments, longest]
        # Padding repeats the segment's first token: a valid index whose result is dropped.
        index = starts[chosen, None] + torch.where(within, position, 0)
        padded_indices.append(index)
        slots = torch.arange(index.numel(), device=cu_seqlens.device).view_as(index) + offset
        restore_index[index[within]] = slots[within]
        offset += index.numel()
    return PackedSegments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        padded_indices=padded_indices,
        restore_index=restore_index,
    )


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Segment numbers in groups, longest first, each within SHORTEST_SHARE of its longest."""
    order = sorted((number for number, length in enumerate(lengths) if length), key=lambda n: (-lengths[n], n))
    groups: list[list[int]] = []
    for number in order:
        if groups and lengths[number] >= SHORTEST_SHARE * lengths[groups[-1][0]]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


@functools.cache
def variable_length_attention() -> Callable[..., Any] | None:
    """torch's own, where it is new enough for causal grouped-query attention; None elsewhere."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known else None


class PackedAttention(MegatronModule):
    """A core attention for Megatron's local layers: causal, packed [T, 1, heads, head_dim] or batched [S, B, ...]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        assert not config.attention_dropout, "outcome-reward training runs without dropout"
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,  # [S, B, heads, head_dim]
        key: Tensor,  # [S, B, groups, head_dim]
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSegments | None = None,
    ) -> Tensor:  # [S, B, heads * head_dim]
        tokens, batch, heads, head_dim = query.shape
        if packed_seq_params is None:
            out = self.causal(*(x.transpose(0, 1) for x in (query, key, value)))
            return out.transpose(0, 1).reshape(tokens, batch, heads * head_dim)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and variable_length_attention():
            out = self.variable_length(query, key, value, packed_seq_params)
        else:
            padded = [
                self.causal(query[index], key[index], value[index]).reshape(-1, heads * head_dim)
                for index in packed_seq_params.padded_indices
            ]
            assert packed_seq_params.restore_index is not None
            out = torch.cat(padded).index_select(0, packed_seq_params.restore_index)
        return out.reshape(tokens, 1, heads * head_dim)

    def causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, S, heads, head_dim] in and out."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        grouped = query.size(1) != key.size(1)
        if grouped and query.is_cuda:  # the fused kernels take equal numbers of heads; without them scores are O(S^2)
            key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
            grouped = False
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)

    def variable_length(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedSegments) -> Tensor:
        attend = variable_length_attention()
        assert attend is not None
        out = attend(
            query,
            key,
            value,
            packed.cu_seqlens_q,
            packed.cu_seqlens_kv,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1, 0),  # causal
            enable_gqa=query.size(1) != key.size(1),
        )
        assert isinstance(out, Tensor)
        return out


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm; Megatron's wrapper of it refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums the gradients of parameters that say so over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
