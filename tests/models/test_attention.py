"""Attention over packed tokens: the padded batches, and which variable-length attention is used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_oreal.models.attention import (
    PackedSegments,
    causal_attention,
    causal_batch,
    pack_segments,
    padded_batches,
    similar_lengths,
    takes_packed_tokens,
)


def test_segments_of_similar_length_share_a_batch() -> None:
    assert similar_lengths([3, 10, 0, 6, 9, 5]) == [[1, 4, 3], [5, 0]]  # 6 is 0.6 of 10, 5 is less
    assert similar_lengths([1]) == [[0]]


def test_padded_batches_by_hand() -> None:
    indices, restore = padded_batches([2, 5, 3])
    # The longest one alone reaches 0.6 of its length with the segment of 3; that of 2 is apart.
    assert [index.tolist() for index in indices] == [[[2, 3, 4, 5, 6], [7, 8, 9, 7, 7]], [[0, 1]]]
    assert restore.tolist() == [10, 11, 0, 1, 2, 3, 4, 5, 6, 7]


def test_padded_batches_give_each_segment_its_own_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 3, 12, 4]
    query, key, value = (torch.randn(25, count, 8, generator=generator) for count in (4, 2, 2))
    indices, restore = padded_batches(lengths)
    padded = [causal_batch(query[index], key[index], value[index], 0.3).flatten(0, 1) for index in indices]
    found = torch.cat(padded).index_select(0, restore)
    wanted = [
        causal_batch(q[None], k[None], v[None], 0.3)[0]
        for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(wanted), atol=1e-6, rtol=1e-6)


def test_a_cpu_packs_padded_batches() -> None:
    cu_seqlens = torch.tensor([0, 2, 7], dtype=torch.int32)
    packed = pack_segments(cu_seqlens, (2, 5), torch.bfloat16)
    assert isinstance(packed, PackedSegments) and packed.qkv_format == "sbhd"
    assert packed.max_seqlen_q == packed.max_seqlen_kv == 5
    assert packed.restore_index is not None and not takes_packed_tokens(torch.device("cpu"), torch.bfloat16)
    # Float32 has no variable-length kernel on any device.
    assert not takes_packed_tokens(torch.device("cuda"), torch.float32)


def test_each_release_gets_the_arguments_that_it_knows() -> None:
    """torch 2.11 takes grouped heads without being told, torch 2.12 wants to be told, older ones have no window."""
    seen: dict[str, Any] = {}

    def of_2_11(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        return_aux: object = None,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        seen.update(scale=scale, window_size=window_size, longest=(max_q, max_k))
        return query

    def of_2_12(*tensors: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:
        seen.update(enable_gqa=enable_gqa)
        return tensors[0]

    def of_2_10(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
        return query

    query, key, cu_seqlens = torch.zeros(7, 6, 8), torch.zeros(7, 2, 8), torch.tensor([0, 7])
    for release in (of_2_11, of_2_12):
        attend = causal_attention(release)
        assert attend is not None
        assert attend(query, key, key, cu_seqlens, 7, 0.5) is query
    assert seen == {"scale": 0.5, "window_size": (-1, 0), "longest": (7, 7), "enable_gqa": True}
    attend = causal_attention(of_2_12)
    assert attend is not None
    attend(query, query, query, cu_seqlens, 7, 0.5)
    assert seen["enable_gqa"] is False
    assert causal_attention(of_2_10) is None and causal_attention(None) is None
