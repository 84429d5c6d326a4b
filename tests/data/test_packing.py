import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from megatron_oreal.data.packing import PackingPlan, assign, own_bins, pack, pad_responses, to_device, unpad_responses
from megatron_oreal.types import Batch, Microbatch, TrainingSequence
from tests.support.tiny_models import random_sequences

F, T = False, True
FIRST = TrainingSequence([11, 12, 13], [14, 15], 0.5, True, [-0.25, -0.5])
SECOND = TrainingSequence([21], [22, 23, 24], -1.0, False)
LENGTHS = (5, 17, 3, 9, 9, 2, 30, 4, 8, 6, 7)  # 30 is longer than the micro-batches below


def make_sequences(lengths: tuple[int, ...]) -> list[TrainingSequence]:
    """Sequence i has the tokens 100 i + 1, 100 i + 2, ..."""
    tokens = [[100 * i + place for place in range(1, length + 1)] for i, length in enumerate(lengths)]
    return [TrainingSequence(ids[:1], ids[1:], 1.0, i % 2 == 0) for i, ids in enumerate(tokens)]


def pack_ranks(lengths: tuple[int, ...], plan: PackingPlan) -> list[Batch]:
    sequences = make_sequences(lengths)
    plans = [
        PackingPlan(
            rank, plan.data_size, plan.microbatch_tokens, plan.token_multiple, plan.count_multiple, plan.equal_lengths
        )
        for rank in range(plan.data_size)
    ]
    return [pack(sequences, plan) for plan in plans]


def trained_sequences(microbatch: Microbatch) -> list[tuple[int, ...]]:
    """The tokens of each segment that trains something."""
    borders = microbatch.cu_seqlens.tolist()
    return [
        tuple(microbatch.input_ids[start:end].tolist())
        for start, end in pairwise(borders)
        if microbatch.loss_mask[start:end].any()
    ]


def test_two_sequences_and_a_filler_by_hand() -> None:
    batch = pack([FIRST, SECOND], PackingPlan(0, 1, microbatch_tokens=100, token_multiple=4))
    (microbatch,) = batch.microbatches
    assert microbatch.input_ids.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24, 0, 0, 0]
    assert microbatch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]
    assert microbatch.sequence_ids.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert (microbatch.cu_seqlens.tolist(), microbatch.max_seqlen) == ([0, 5, 9, 12], 5)
    # The last prompt token predicts the response's first, its last token nothing.
    assert microbatch.loss_mask.tolist() == [F, F, T, T, F, T, T, T, F, F, F, F]
    assert microbatch.labels[microbatch.loss_mask].tolist() == [14, 15, 22, 23, 24]
    assert microbatch.labels[:4].tolist() == [12, 13, 14, 15]
    assert microbatch.advantages.tolist() == [0, 0, 0.5, 0.5, 0, -1, -1, -1, 0, 0, 0, 0]
    assert microbatch.engine_logprobs[:5].tolist() == [0, 0, -0.25, -0.5, 0]
    assert microbatch.engine_logprobs.isnan().tolist() == [F] * 5 + [T] * 3 + [F] * 4  # the second's are not known
    assert microbatch.is_correct.tolist() == [T, F, F]
    assert (microbatch.input_ids.dtype, microbatch.cu_seqlens.dtype) == (torch.int64, torch.int32)


def test_counts_by_hand() -> None:
    batch = pack([FIRST, SECOND], PackingPlan(0, 1, microbatch_tokens=100, token_multiple=4))
    assert (batch.num_sequences, batch.num_correct_sequences) == (2, 1)
    assert (batch.num_tokens, batch.num_correct_tokens, batch.num_incorrect_tokens) == (5, 2, 3)
    assert batch.num_padding_tokens == 3


def test_without_a_multiple_there_is_no_filler() -> None:
    (microbatch,) = pack([FIRST, SECOND], PackingPlan(0, 1, microbatch_tokens=100)).microbatches
    assert microbatch.cu_seqlens.tolist() == [0, 5, 9]
    assert microbatch.num_sequences == 2


@pytest.mark.parametrize("data_size", [1, 2, 3])
@pytest.mark.parametrize("num_sequences", [0, 1, 2, 7, 11])
@pytest.mark.parametrize("count_multiple", [1, 4])
def test_every_sequence_is_trained_exactly_once(data_size: int, num_sequences: int, count_multiple: int) -> None:
    lengths = LENGTHS[:num_sequences]
    plan = PackingPlan(0, data_size, microbatch_tokens=20, token_multiple=4, count_multiple=count_multiple)
    batches = pack_ranks(lengths, plan)
    trained = [
        tokens for batch in batches for microbatch in batch.microbatches for tokens in trained_sequences(microbatch)
    ]
    expected = [tuple(sequence.token_ids.tolist()) for sequence in make_sequences(lengths)]
    assert sorted(trained) == expected
    num_masked = sum(int(microbatch.loss_mask.sum()) for batch in batches for microbatch in batch.microbatches)
    for batch in batches:
        assert batch.num_sequences == num_sequences
        assert batch.num_tokens == batch.num_correct_tokens + batch.num_incorrect_tokens == num_masked


@pytest.mark.parametrize("data_size", [1, 2, 3])
def test_ranks_have_equally_many_microbatches_within_the_limits(data_size: int) -> None:
    plan = PackingPlan(0, data_size, microbatch_tokens=20, token_multiple=4, count_multiple=2)
    batches = pack_ranks(LENGTHS, plan)
    (count,) = {len(batch.microbatches) for batch in batches}
    assert count % 2 == 0
    for batch in batches:
        for microbatch in batch.microbatches:
            sequences = trained_sequences(microbatch)
            assert sum(map(len, sequences)) <= 20 or len(sequences) == 1
            assert len(microbatch.input_ids) % 4 == 0 and len(microbatch.input_ids) > 0
            assert microbatch.cu_seqlens[-1] == len(microbatch.input_ids)
        num_real = sum(len(tokens) for microbatch in batch.microbatches for tokens in trained_sequences(microbatch))
        total = sum(len(microbatch.input_ids) for microbatch in batch.microbatches)
        assert batch.num_padding_tokens == total - num_real


def test_microbatches_of_equal_length_for_interleaved_pipelines() -> None:
    plan = PackingPlan(0, 2, microbatch_tokens=20, token_multiple=4, count_multiple=2, equal_lengths=True)
    batches = pack_ranks(LENGTHS, plan)
    for batch in batches:
        assert len({len(microbatch.input_ids) for microbatch in batch.microbatches}) == 1
    trained = [
        tokens for batch in batches for microbatch in batch.microbatches for tokens in trained_sequences(microbatch)
    ]
    assert len(trained) == len(set(trained)) == len(LENGTHS)


def test_ranks_are_balanced_by_tokens() -> None:
    # Longest first, each to the lightest rank: 6 | 5, 4 -> 5 + 4 | 6, 3 -> 6 + 3 | 5 + 4, 2, 1.
    assert assign([1, 2, 3, 4, 5, 6], num_ranks=2, capacity=100) == [[[1, 2, 5]], [[0, 3, 4]]]


def test_ranks_are_balanced_by_cost() -> None:
    # A token pair costs 1: 10 -> 110, 6 -> 42, 5 -> 30, 4 -> 20. By tokens the rank of 10 would get 4 as well.
    assert assign([10, 6, 5, 4], num_ranks=2, capacity=100) == [[[0, 3]], [[1, 2]]]
    assert assign([10, 6, 5, 4], num_ranks=2, capacity=100, pair_cost=1.0) == [[[0]], [[1, 2, 3]]]


@pytest.mark.parametrize("num_sequences", [256, 1024])
def test_long_tails_are_balanced_over_sixteen_ranks(num_sequences: int) -> None:
    """Lengths of a log-normal distribution of up to 32,768 tokens; pairs cost what they cost in a 7B model."""
    random_lengths = np.random.default_rng(0).lognormal(np.log(3000), 1.2, num_sequences)
    lengths, pair_cost = np.clip(random_lengths, 64, 32768).astype(int), 1.4e-5
    costs = lengths + pair_cost * lengths.astype(float) ** 2
    assigned = assign(lengths.tolist(), 16, 16384, pair_cost=pair_cost)
    loads = [sum(costs[number] for bin_ in bins for number in bin_) for bins in assigned]
    assert max(loads) <= 1.03 * np.mean(loads)
    assert len({len(bins) for bins in assigned}) == 1
    assert sorted(number for bins in assigned for bin_ in bins for number in bin_) == list(range(num_sequences))


def test_short_sequences_are_balanced_by_tokens() -> None:
    """Where the pairs of the longest sequence cost less than a tenth of its tokens."""
    sequences = make_sequences((10, 6, 5, 4))

    def sizes(pair_cost: float) -> list[list[int]]:
        plans = [PackingPlan(rank, 2, microbatch_tokens=100, pair_cost=pair_cost) for rank in range(2)]
        return [[sequence.num_tokens for sequence in own_bins(sequences, plan)[0]] for plan in plans]

    assert sizes(0.0) == sizes(0.009) == [[10, 4], [6, 5]]
    assert sizes(1.0) == [[10], [6, 5, 4]]


def test_a_sequence_that_is_too_long_is_alone() -> None:
    assert assign([3, 9, 3], num_ranks=1, capacity=6) == [[[1], [0, 2]]]


def test_a_rank_without_sequences_gets_fillers() -> None:
    _, idle = pack_ranks((5,), PackingPlan(0, 2, microbatch_tokens=10, token_multiple=4))
    (filler,) = idle.microbatches
    assert not filler.loss_mask.any() and filler.advantages.tolist() == [0, 0, 0, 0]
    assert filler.num_sequences == 1 and not filler.is_correct.any()


def test_padded_responses_by_hand_and_back() -> None:
    (microbatch,) = pack([FIRST, SECOND], PackingPlan(0, 1, microbatch_tokens=100, token_multiple=4)).microbatches
    values = torch.arange(12.0)
    padded, mask = pad_responses(values, microbatch)
    assert padded.tolist() == [[2, 3, 0], [5, 6, 7], [0, 0, 0]]
    assert mask.tolist() == [[T, T, F], [T, T, T], [F, F, F]]
    assert unpad_responses(padded, microbatch).tolist() == [0, 0, 2, 3, 0, 5, 6, 7, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_unpadding_is_the_inverse_of_padding(dtype: torch.dtype) -> None:
    for batch in pack_ranks(LENGTHS, PackingPlan(0, 2, microbatch_tokens=25, token_multiple=8)):
        for microbatch in batch.microbatches:
            values = torch.arange(1, len(microbatch.labels) + 1).to(dtype)
            padded, mask = pad_responses(values, microbatch)
            unpadded = unpad_responses(padded, microbatch)
            assert torch.equal(unpadded, torch.where(microbatch.loss_mask, values, 0))
            assert unpadded.dtype == dtype
            assert int(mask.sum()) == int(microbatch.loss_mask.sum())


def test_a_filler_pads_to_nothing() -> None:
    (filler,) = pack([], PackingPlan(0, 1, microbatch_tokens=10)).microbatches
    padded, mask = pad_responses(torch.ones(2), filler)
    assert padded.tolist() == [[0]] and mask.tolist() == [[F]]
    assert unpad_responses(padded, filler).tolist() == [0, 0]


def test_a_packed_microbatch_is_what_its_definition_says_token_by_token() -> None:
    sequences = random_sequences(40, seed=3)
    sequences[5].model_logprobs = np.empty(0, np.float32)
    batch = pack(sequences, PackingPlan(0, 1, microbatch_tokens=64, token_multiple=8))
    bins = own_bins(sequences, PackingPlan(0, 1, microbatch_tokens=64, token_multiple=8))
    for microbatch, members in zip(batch.microbatches, bins, strict=True):
        rows = []  # input id, position, sequence, trained, advantage, log-prob
        for number, one in enumerate(members):
            length, num_prompt = one.num_tokens, len(one.prompt_ids)
            for position, token in enumerate([*one.prompt_ids.tolist(), *one.response_ids.tolist()]):
                is_trained = num_prompt - 1 <= position < length - 1
                known = (
                    one.model_logprobs[position - num_prompt + 1] if is_trained and len(one.model_logprobs) else None
                )
                logprob = (math.nan if known is None else known) if is_trained else 0.0
                rows.append((token, position, number, is_trained, one.advantage if is_trained else 0.0, logprob))
        padding = -len(rows) % 8
        rows += [(0, position, len(members), False, 0.0, 0.0) for position in range(padding)]
        tensors = (microbatch.input_ids, microbatch.position_ids, microbatch.sequence_ids, microbatch.loss_mask,
                   microbatch.advantages, microbatch.engine_logprobs)  # fmt: skip
        for tensor, column in zip(tensors, zip(*rows, strict=True), strict=True):
            assert torch.equal(tensor.nan_to_num(7.0), torch.tensor(column, dtype=tensor.dtype).nan_to_num(7.0))
        assert microbatch.labels.tolist() == [*microbatch.input_ids[1:].tolist(), int(microbatch.input_ids[0])]
        assert len(microbatch.is_correct) == len(members) + (padding > 0)


@pytest.mark.parametrize("seed", range(20))
def test_assignment_is_first_fit_of_the_longest_first(seed: int) -> None:
    """Beside an implementation that looks at every rank and every micro-batch."""
    rng = random.Random(seed)
    lengths, num_ranks = [rng.randint(1, 30) for _ in range(rng.randint(0, 60))], rng.randint(1, 4)
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        min(ranks, key=lambda rank: sum(lengths[i] for i in rank)).append(number)
    expected = []
    for rank in ranks:
        bins: list[list[int]] = []
        for number in rank:
            fitting = (bin_ for bin_ in bins if sum(lengths[i] for i in bin_) + lengths[number] <= 25)
            chosen = next(fitting, None)
            if chosen is None:
                bins.append(chosen := [])
            chosen.append(number)
        expected.append([sorted(bin_) for bin_ in bins])
    assigned = assign(lengths, num_ranks, capacity=25)
    assert [[bin_ for bin_ in bins if bin_] for bins in assigned] == expected


def test_a_sequence_needs_a_prompt_and_log_probs_of_all_its_tokens() -> None:
    plan = PackingPlan(0, 1, microbatch_tokens=100)
    with pytest.raises(AssertionError, match="last prompt token"):
        pack([FIRST, TrainingSequence([], [1, 2], 1.0, True)], plan)
    with pytest.raises(AssertionError, match="for each response token"):
        pack([TrainingSequence([1], [2, 3], 1.0, True, [-0.5])], plan)


def test_read_only_arrays_are_packed() -> None:
    """As those that are read from the ledger."""
    ids = np.frombuffer(np.array([5, 6], np.int32).tobytes(), np.int32)
    (microbatch,) = pack([TrainingSequence([1], ids, 1.0, True)], PackingPlan(0, 1, microbatch_tokens=9)).microbatches
    assert microbatch.input_ids.tolist() == [1, 5, 6]


def test_all_tensors_of_a_microbatch_go_to_the_device() -> None:
    """The device "meta" stands for any that is not the CPU."""
    batch = pack([FIRST, SECOND], PackingPlan(0, 1, microbatch_tokens=64))
    moved = to_device(batch.microbatches[0], torch.device("meta"))
    tensors = [value for name in Microbatch.__slots__ if isinstance(value := getattr(moved, name), torch.Tensor)]
    assert tensors and all(tensor.device.type == "meta" for tensor in tensors)
