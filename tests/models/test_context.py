"""Attention of context-parallel ranks against that of one rank, without processes: values and gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models.attention import pack_segments
from megatron_oreal.models.context import context_segments
from tests.support.tiny_models import random_sequences

HEADS, GROUPS, HEAD_DIM, SCALE = 6, 2, 16, 0.25


def whole_attention(size: int, leaves: list[Tensor]) -> Tensor:
    """Attends rank by rank, and returns the outputs of the micro-batch's tokens."""
    outputs: list[Tensor] = []
    restore = None
    for rank in range(size):
        (microbatch,) = pack(
            random_sequences(8), PackingPlan(0, 1, 10_000, context_rank=rank, context_size=size)
        ).microbatches
        assert microbatch.part is not None
        tokens, restore = microbatch.part.tokens, microbatch.part.restore
        layout: Any = SimpleNamespace(
            context_rank=rank, context_size=size, context_group=None, device=torch.device("cpu")
        )
        segments = context_segments(microbatch.part, layout)
        # What the ranks would gather: each token where it stands, and repeated ones where a sequence has ended.
        num_tokens = len(tokens.input_ids)
        place = torch.zeros(size * num_tokens, dtype=torch.int64)
        place[restore] = torch.arange(len(restore))
        query, key, value = (leaf[place] for leaf in leaves)
        own = query[rank * num_tokens : (rank + 1) * num_tokens]
        outputs.append(segments.attend_to(own, key, value, SCALE))
    return torch.cat(outputs)[restore]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_chunks_attend_as_whole_sequences_do(size: int) -> None:
    (microbatch,) = pack(random_sequences(8), PackingPlan(0, 1, 10_000)).microbatches
    torch.manual_seed(0)
    num_tokens = len(microbatch.input_ids)
    leaves = [torch.randn(num_tokens, count, HEAD_DIM, requires_grad=True) for count in (HEADS, GROUPS, GROUPS)]
    weights = torch.randn(num_tokens, HEADS * HEAD_DIM)
    packed = pack_segments(microbatch.cu_seqlens, microbatch.lengths, torch.float32)
    wanted = packed.attend(*leaves, SCALE)
    found = whole_attention(size, leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((wanted * weights).sum(), leaves),
        strict=True,
    ):
        assert float((one - other).norm() / other.norm()) < 1e-6
