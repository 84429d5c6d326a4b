"""Computes attention over packed sequences with torch alone, and the norm that the local layers use.

Megatron's local DotProductAttention refuses packed sequences. On CUDA in half precision, torch's variable-length
attention accepts the packed tokens directly. Elsewhere the segments of a micro-batch are gathered into a few padded
batches of similar length, and each batch is one call of scaled_dot_product_attention. This is exact and needs no mask,
because causality hides the padding at the end.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_oreal.data.packing import copy_to_device

# A padded batch holds segments of at least this share of its longest one, which bounds the padding.
SHORTEST_SHARE = 0.6


@dataclass
class PackedSegments(PackedSeqParams):
    """PackedSeqParams for the local layers. The format "sbhd" avoids Megatron's rotary loop over segments.

    The index tensors are empty if variable-length attention handles the packed tokens.
    """

    padded_indices: list[Tensor] = field(default_factory=list)  # [segments, longest] int64 into [T], per padded batch
    restore_index: Tensor | None = None  # [T] int64, the position of token t in the concatenated padded batches

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Computes causal attention: [T, heads, D] with key and value of [T, groups, D] -> [T, heads * D]."""
        if self.restore_index is None:
            packed = variable_length_attention()
            assert packed is not None
            return packed(query, key, value, self.cu_seqlens_q, self.max_seqlen_q, scale).flatten(1)
        padded = [
            causal_batch(query[index], key[index], value[index], scale).flatten(0, 1).flatten(1)
            for index in self.padded_indices
        ]
        return torch.cat(padded).index_select(0, self.restore_index)


def pack_segments(cu_seqlens: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> PackedSegments:
    """Builds what PackedAttention needs for a micro-batch with segments of these lengths and activations of `dtype`.

    cu_seqlens: [N + 1] int32 on the device of the activations. `lengths` are the same numbers on the host, so the
    function never waits for the device.
    """
    packed = PackedSegments(
        qkv_format="sbhd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
    )
    if not takes_packed_tokens(cu_seqlens.device, dtype):
        indices, restore_index = padded_batches(lengths)
        packed.padded_indices = [copy_to_device(index, cu_seqlens.device) for index in indices]
        packed.restore_index = copy_to_device(restore_index, cu_seqlens.device)
    return packed


def padded_batches(lengths: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Returns `padded_indices` and `restore_index` of PackedSegments, on the host."""
    of_segment = torch.tensor(lengths)
    starts = of_segment.cumsum(0) - of_segment
    padded_indices: list[Tensor] = []
    restore_index = torch.empty(sum(lengths), dtype=torch.int64)
    offset = 0
    for segments in similar_lengths(lengths):
        chosen = torch.tensor(segments)
        position = torch.arange(lengths[segments[0]])
        within = position < of_segment[chosen, None]  # [segments, longest]
        # Padding repeats the segment's first token: a valid index whose result is dropped.
        index = starts[chosen, None] + torch.where(within, position, 0)
        padded_indices.append(index)
        slots = torch.arange(index.numel()).view_as(index) + offset
        restore_index[index[within]] = slots[within]
        offset += index.numel()
    return padded_indices, restore_index


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Groups segment numbers, longest first; all lengths of a group reach SHORTEST_SHARE of its longest one."""
    order = sorted((number for number, length in enumerate(lengths) if length), key=lambda n: (-lengths[n], n))
    groups: list[list[int]] = []
    for number in order:
        if groups and lengths[number] >= SHORTEST_SHARE * lengths[groups[-1][0]]:
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


# (query [T, heads, D], key [T, groups, D], value, cu_seqlens, longest, scale) -> [T, heads, D], causal
PackedAttend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]
# The largest accepted relative error against scaled_dot_product_attention in float32; bfloat16 keeps 8 bits.
CHECK_TOLERANCE = 0.03


def takes_packed_tokens(device: torch.device, dtype: torch.dtype) -> bool:
    """Says whether attention on this device and in this precision accepts packed tokens without padded copies."""
    in_half = dtype in (torch.float16, torch.bfloat16)
    return device.type == "cuda" and in_half and variable_length_attention() is not None


@functools.cache
def variable_length_attention() -> PackedAttend | None:
    """Returns torch's variable-length attention with causal masks and grouped heads, or None if torch lacks either.

    On CUDA the function first computes one small case both ways, because releases accept different arguments; torch
    2.11 takes grouped heads without an `enable_gqa` argument. Warns if CUDA must use the padded form instead.
    """
    attend = causal_attention(torch_varlen_attn())
    if attend is None or not torch.cuda.is_available():
        return attend
    if problem := difference_from_padded(attend):
        warnings.warn(
            f"torch {torch.__version__}: variable-length attention is not used, because {problem}; attention over "
            "padded batches takes more time",
            stacklevel=2,
        )
        return None
    return attend


def torch_varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def causal_attention(varlen_attn: Callable[..., Any] | None) -> PackedAttend | None:
    """Wraps varlen_attn of this torch release; returns None for releases before 2.11, which have no window."""
    if varlen_attn is None:
        return None
    known = inspect.signature(varlen_attn).parameters.keys()
    if not {"scale", "window_size"} <= known:
        return None

    def attend(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
        # Releases without the argument do not compare the numbers of heads, and their operator accepts grouped heads.
        grouped = {"enable_gqa": query.size(1) != key.size(1)} if "enable_gqa" in known else {}
        out = varlen_attn(
            query,
            key,
            value,
            cu_seqlens,
            cu_seqlens,
            longest,
            longest,
            scale=scale,
            window_size=(-1, 0),  # no token attends to a later one
            **grouped,
        )
        assert isinstance(out, Tensor)
        return out

    return attend


def difference_from_padded(attend: PackedAttend, device: str = "cuda") -> str:
    """Describes errors in values or gradients of `attend` against padded attention in float32; empty if there are none.

    The check uses two segments and three query heads for each key head.
    """
    generator = torch.Generator().manual_seed(0)  # this leaves CUDA's generator unchanged
    lengths, heads, groups, head_dim = [5, 19], 6, 2, 64
    query, key, value, weights = (
        torch.randn(sum(lengths), count, head_dim, generator=generator).bfloat16().to(device)
        for count in (heads, groups, groups, heads)
    )
    cu_seqlens = torch.tensor([0, 5, 24], dtype=torch.int32, device=device)

    def packed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query, key, value, cu_seqlens, 19, head_dim**-0.5)

    def padded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        segments = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return torch.cat([causal_batch(q[None], k[None], v[None], head_dim**-0.5)[0] for q, k, v in segments])

    results = []
    for function, dtype in ((packed, torch.bfloat16), (padded, torch.float32)):
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (query, key, value)]
        try:
            with torch.enable_grad():
                out = function(*leaves)
                gradients = torch.autograd.grad((out.float() * weights.float()).sum(), leaves)
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            return f"it raises {type(error).__name__}: {error}"
        results.append([tensor.detach().float() for tensor in (out, *gradients)])
    for name, found, wanted in zip(("values", "query", "key", "value"), *results, strict=True):
        difference = float((found - wanted).norm() / wanted.norm())
        if not difference < CHECK_TOLERANCE:
            what = "the output" if name == "values" else f"the gradient of its {name}"
            return f"{what} differs from scaled_dot_product_attention by {difference:.3g} of the norm"
    return ""


def causal_batch(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Computes causal attention of [B, S, heads, head_dim]; key and value may have fewer heads."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.size(1) != key.size(1)
    if grouped and query.is_cuda:  # the fused kernels need equal numbers of heads; other kernels keep O(S^2) scores
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
        grouped = False
    with deterministic_backend(query):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def deterministic_backend(query: Tensor) -> AbstractContextManager[Any]:
    """Avoids the memory-efficient kernel, CUDA's only fused one for float32, if results must be deterministic."""
    if query.is_cuda and query.dtype is torch.float32 and torch.are_deterministic_algorithms_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


class PackedAttention(MegatronModule):
    """Causal core attention for Megatron's local layers: packed [T, 1, heads, head_dim] or batched [S, B, ...]."""

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
        assert config.context_parallel_size == 1, "see models/context.py: Megatron is not told of it"
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
            out = causal_batch(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), self.softmax_scale)
            return out.transpose(0, 1).reshape(tokens, batch, heads * head_dim)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        out = packed_seq_params.attend(query, key, value, self.softmax_scale)
        return out.reshape(tokens, 1, heads * head_dim)


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm. Megatron's wrapper of it refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # finalize_model_grads sums the gradients of marked parameters over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
