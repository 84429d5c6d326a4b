"""How micro-batches are split over the ranks of context parallelism: by hand, and what always holds."""

from __future__ import annotations

import pytest
import torch

from megatron_oreal.data.context import chunk_lengths, gathered_places
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import ContextPart, Microbatch, TrainingSequence
from tests.support.tiny_models import random_sequences

F, T = False, True


def parts_of(
    sequences: list[TrainingSequence], size: int, **plan: object
) -> tuple[list[Microbatch], list[ContextPart]]:
    """The micro-batches, which are the same on every rank, and the parts: of each rank those of all micro-batches."""
    batches = [
        pack(sequences, PackingPlan(0, 1, 48, context_rank=rank, context_size=size, **plan))  # type: ignore[arg-type]
        for rank in range(size)
    ]
    parts = [microbatch.part for batch in batches for microbatch in batch.microbatches]
    return batches[0].microbatches, [part for part in parts if part is not None]


def test_two_ranks_by_hand() -> None:
    sequences = [TrainingSequence([11, 12], [13, 14, 15], 0.5, True, [-1, -2, -3]), TrainingSequence([21], [22], -1, F)]
    (microbatch,), (first, second) = parts_of(sequences, 2)
    assert microbatch.input_ids.tolist() == [11, 12, 13, 14, 15, 21, 22]  # nothing is padded there
    # Chunks of two tokens and of one: 11 12 | 13 14 | 15 15 | 15 15 and 21 | 22 | 22 | 22. The second rank has the
    # middle ones.
    assert first.tokens.input_ids.tolist() == [11, 12, 15, 15, 21, 22]
    assert second.tokens.input_ids.tolist() == [13, 14, 15, 15, 22, 22]
    assert first.tokens.position_ids.tolist() == [0, 1, 4, 4, 0, 1]
    assert first.tokens.labels.tolist()[:2] == [12, 13]  # of a token on the other rank
    assert second.tokens.labels.tolist()[:2] == [14, 15]
    assert first.tokens.loss_mask.tolist() == [F, T, F, F, T, F]
    assert second.tokens.loss_mask.tolist() == [T, T, F, F, F, F]
    assert first.tokens.advantages.tolist() == [0, 0.5, 0, 0, -1, 0]
    assert second.tokens.engine_logprobs.tolist() == [-2, -3, 0, 0, 0, 0]
    assert (first.tokens.trained.tolist(), second.tokens.trained.tolist()) == ([1, 4], [0, 1])
    assert (first.tokens.trained_correct.tolist(), first.tokens.trained_incorrect.tolist()) == ([1], [4])
    assert second.tokens.trained_places.tolist() == [1, 2]
    assert first.tokens.lengths == (4, 2) and first.tokens.cu_seqlens.tolist() == [0, 4, 6]
    assert first.restore.tolist() == [0, 1, 6, 7, 8, 4, 10] == second.restore.tolist()


@pytest.mark.parametrize(
    ("arguments", "chunks"),
    [
        (([5, 4], 2), [2, 1]),
        (([16], 4), [2]),
        (([1], 4), [1]),
        (([5, 4], 2, 4), [2, 2]),  # sequence parallelism over four ranks
        (([5, 4], 2, 3), [2, 1]),
        (([5, 4], 2, 5), [2, 3]),
        (([5, 4], 2, 2, 20), [2, 8]),  # as long as another micro-batch
    ],
)
def test_lengths_of_chunks(arguments: tuple[list[int], int], chunks: list[int]) -> None:
    assert chunk_lengths(*arguments) == chunks


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_token_is_on_one_rank(size: int) -> None:
    microbatches, parts = parts_of(random_sequences(9), size, token_multiple=2)
    assert len(microbatches) > 2
    for number, microbatch in enumerate(microbatches):
        of_ranks = parts[number :: len(microbatches)]
        lengths = {len(part.tokens.input_ids) for part in of_ranks}
        assert len(lengths) == 1 and lengths.pop() % 2 == 0
        for name in ("input_ids", "labels", "position_ids", "sequence_ids", "loss_mask", "advantages"):
            gathered = torch.cat([getattr(part.tokens, name) for part in of_ranks])
            assert torch.equal(gathered[of_ranks[0].restore], getattr(microbatch, name)), name
        trained = sum(len(part.tokens.trained) for part in of_ranks)
        assert trained == len(microbatch.trained)


def test_interleaved_pipelines_get_parts_of_one_length() -> None:
    microbatches, parts = parts_of(random_sequences(9), 2, equal_lengths=True, token_multiple=2)
    assert len(microbatches) > 2
    assert len({len(part.tokens.input_ids) for part in parts}) == 1


def test_the_work_of_attention_is_balanced() -> None:
    """Each rank's queries see as many tokens, up to half a chunk a sequence."""
    size, length = 4, 64
    (place,) = gathered_places(chunk_lengths([length], size), size)
    owner = place // (length // size)
    seen = [sum(position + 1 for position in (owner == rank).nonzero()[:, 0].tolist()) for rank in range(size)]
    assert set(seen) == {length * (length + 1) // 2 // size}


def test_without_context_parallelism_there_are_no_parts() -> None:
    assert all(microbatch.part is None for microbatch in pack(random_sequences(5), PackingPlan(0, 1, 48)).microbatches)
