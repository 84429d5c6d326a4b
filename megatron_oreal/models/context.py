"""Implements context parallelism: attention across ranks, and per-token values of whole micro-batches.

Keys and values are gathered over the ranks, and their gradients are summed and scattered back. Each of a rank's two
chunks of a sequence (data/context.py) attends to the sequence up to its own tokens. The memory for keys and values
therefore does not shrink with the number of ranks; all other memory does.

The heads' values, a few numbers per token, are gathered too, so that every rank computes losses, prefix means and
advantages on whole sequences. A rank's gradients belong to the values of its own tokens; their sum over the ranks is
the gradient, as for replicas. Megatron sums over both kinds of ranks. It receives only the process groups, because with
a context_parallel_size in its TransformerConfig the layers would split rotary embeddings, which here follow
position_ids.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_oreal.data.context import chunks_of, gathered_places
from megatron_oreal.data.packing import copy_to_device
from megatron_oreal.models.attention import PackedSegments, similar_lengths
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import ContextPart, TokenOutputs


@dataclass(slots=True)
class ChunkBatch:
    """Chunks of similar lengths, padded to the longest: B chunks of Q queries, each with K keys."""

    queries: Tensor  # [B, Q] int64 into this rank's tokens
    keys: Tensor  # [B, K] int64 into the tokens of all ranks
    positions: Tensor  # [B, Q] int64, each query's position in its sequence: it attends to the keys up to there


@dataclass
class ContextSegments(PackedSegments):
    """PackedSegments of one rank's tokens; `restore_index` restores the rank's order."""

    group: dist.ProcessGroup | None = None
    batches: list[ChunkBatch] = field(default_factory=list)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Computes PackedSegments.attend for the L tokens of each rank. Collective over the context-parallel group."""
        assert self.group is not None
        pair = torch.stack([key, value], dim=1)  # [L, 2, groups, head_dim]
        keys, values = gather_from_sequence_parallel_region(pair, group=self.group).unbind(dim=1)
        return self.attend_to(query, keys, values, scale)

    def attend_to(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Computes the same with keys and values of all ranks, [C * L, groups, head_dim]."""
        assert self.restore_index is not None
        padded = []
        for batch in self.batches:
            visible = torch.arange(batch.keys.size(1), device=query.device) <= batch.positions[:, :, None]
            out = attend_batch(query[batch.queries], keys[batch.keys], values[batch.keys], visible, scale)
            padded.append(out.flatten(0, 1).flatten(1))
        return torch.cat(padded).index_select(0, self.restore_index)


def attend_batch(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attends in one batch. query: [B, Q, heads, D]; key and value: [B, K, groups, D]; visible: [B, Q, K] bool."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    grouped = query.size(1) != key.size(1)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible[:, None], scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def context_segments(part: ContextPart, layout: ParallelLayout) -> ContextSegments:
    """Returns the indices that attention needs for a rank's tokens; no pass changes them."""
    tokens, device = part.tokens, layout.device
    chunks = [length // 2 for length in tokens.lengths]
    places = gathered_places(chunks, layout.context_size)
    restore_index = torch.empty(sum(tokens.lengths), dtype=torch.int64)
    batches: list[ChunkBatch] = []
    offset = 0
    for late, number in enumerate(chunks_of(layout.context_rank, layout.context_size)):
        for sequences in similar_lengths(chunks):
            batch = padded_chunks(chunks, places, sequences, number, bool(late))
            for row, sequence in enumerate(sequences):
                slots = torch.arange(chunks[sequence])
                restore_index[batch.queries[row, slots]] = offset + row * batch.queries.size(1) + slots
            offset += batch.queries.numel()
            batches.append(batch)
    for batch in batches:
        for name in ChunkBatch.__slots__:
            setattr(batch, name, copy_to_device(getattr(batch, name), device))
    return ContextSegments(
        qkv_format="sbhd",
        cu_seqlens_q=tokens.cu_seqlens,
        cu_seqlens_kv=tokens.cu_seqlens,
        max_seqlen_q=tokens.max_seqlen,  # of the whole sequences, because rotary embeddings cover all positions
        max_seqlen_kv=tokens.max_seqlen,
        restore_index=copy_to_device(restore_index, device),
        group=layout.context_group,
        batches=batches,
    )


def padded_chunks(chunks: list[int], places: list[Tensor], sequences: list[int], number: int, late: bool) -> ChunkBatch:
    """Returns chunk number `number` of each sequence, longest first. Padding repeats the first token."""
    begins = list(begins_of(chunks))
    longest = chunks[sequences[0]]
    slot = torch.arange(longest)
    queries, keys, positions = [], [], []
    for sequence in sequences:
        length = chunks[sequence]
        within = torch.where(slot < length, slot, 0)
        queries.append(begins[sequence] + length * late + within)
        positions.append(length * number + within)
        seen = places[sequence][: length * (number + 1)]
        keys.append(F.pad(seen, (0, (longest - length) * (number + 1)), value=int(seen[0])))
    return ChunkBatch(torch.stack(queries), torch.stack(keys), torch.stack(positions))


def begins_of(chunks: list[int]) -> Iterator[int]:
    """Yields the position where each sequence begins among a rank's tokens."""
    begin = 0
    for length in chunks:
        yield begin
        begin += 2 * length


def whole_outputs(outputs: TokenOutputs, part: ContextPart, layout: ParallelLayout) -> TokenOutputs:
    """Gathers [L] of each rank into [T] of the micro-batch. Backward keeps the gradients of this rank's own tokens."""
    columns = [outputs.values] if outputs.entropy is None else [outputs.values, outputs.entropy]
    gathered = gather_from_sequence_parallel_region(
        torch.stack(columns, dim=1), tensor_parallel_output_grad=False, group=layout.context_group
    )
    values, *entropy = (column.index_select(0, part.restore) for column in gathered.unbind(dim=1))
    return TokenOutputs(values, entropy[0] if entropy else None)
