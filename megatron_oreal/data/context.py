"""Splits a micro-batch over the ranks of context parallelism, on the host.

Each sequence is cut into 2 C chunks of equal length, where C is the number of ranks; its last token is repeated until
it can be. Rank r has the chunks r and 2 C - 1 - r: so every rank has as many tokens, and as many pairs of a query and
an earlier key. Labels, positions and masks are those of the whole micro-batch, cut in the same way, so that no label
lies on another rank.

The repeated tokens stand behind their sequence, where no token of it sees them, and nothing is read from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from megatron_oreal.types import ContextPart, Microbatch


def chunk_lengths(lengths: Sequence[int], size: int, multiple: int = 1, total: int | None = None) -> list[int]:
    """Returns how many tokens a chunk of each sequence has; a rank has two chunks of each.

    The last sequence's chunks are longer than they need to be where a rank's tokens would not be a multiple of
    `multiple`, or be fewer than `total`.
    Example: sequences of 5 and 4 tokens over 2 ranks -> [2, 1]: each rank has 2 x (2 + 1) tokens.
    """
    chunks = [-(-length // (2 * size)) for length in lengths]
    while 2 * sum(chunks) % multiple:
        chunks[-1] += 1
    if total is not None:
        assert total >= 2 * sum(chunks) and total % 2 == 0
        chunks[-1] += total // 2 - sum(chunks)
    return chunks


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Returns the numbers of a rank's two chunks, in the order in which it holds them."""
    return rank, 2 * size - 1 - rank


def gathered_places(chunks: Sequence[int], size: int) -> list[Tensor]:
    """Returns for each sequence [2 C chunk] int64: where its tokens stand in all ranks' tokens, rank after rank."""
    total = 2 * sum(chunks)
    places = []
    begin = 0
    for length in chunks:
        starts = torch.empty(2 * size, dtype=torch.int64)  # of each chunk
        for rank in range(size):
            early, late = chunks_of(rank, size)
            starts[early] = rank * total + begin
            starts[late] = rank * total + begin + length
        places.append((starts[:, None] + torch.arange(length)).flatten())
        begin += 2 * length
    return places


def context_part(microbatch: Microbatch, chunks: Sequence[int], rank: int, size: int) -> ContextPart:
    """Cuts out the tokens of a rank. `chunks` are the chunk_lengths of the micro-batch's sequences."""
    own = []
    begin = 0
    for length, chunk in zip(microbatch.lengths, chunks, strict=True):
        position = torch.cat([torch.arange(chunk) + number * chunk for number in chunks_of(rank, size)])
        own.append(begin + position.clamp_max(length - 1))
        begin += length
    index = torch.cat(own)
    loss_mask = microbatch.loss_mask[index]  # a sequence's last token predicts nothing, nor do its repetitions
    trained = loss_mask.nonzero()[:, 0]
    sequence_ids = microbatch.sequence_ids[index]
    of_correct = microbatch.is_correct[sequence_ids[trained]]
    response_places = torch.zeros_like(microbatch.labels).index_copy(0, microbatch.trained, microbatch.trained_places)
    lengths = tuple(2 * chunk for chunk in chunks)
    tokens = replace(
        microbatch,
        input_ids=microbatch.input_ids[index],
        labels=microbatch.labels[index],
        position_ids=microbatch.position_ids[index],
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        loss_mask=loss_mask,
        sequence_ids=sequence_ids,
        advantages=microbatch.advantages[index],
        engine_logprobs=microbatch.engine_logprobs[index],
        lengths=lengths,
        trained=trained,
        trained_correct=trained[of_correct],
        trained_incorrect=trained[~of_correct],
        trained_places=response_places[index[trained]],
    )
    places = gathered_places(chunks, size)
    restore = [place[:length] for place, length in zip(places, microbatch.lengths, strict=True)]
    return ContextPart(tokens, torch.cat(restore))
