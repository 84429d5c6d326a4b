"""Packs sequences into micro-batches and balances them over the data-parallel ranks.

Every rank gets all sequences and computes the same assignment without communication. Each sequence is trained exactly
once for any number of ranks: a micro-batch without a sequence consists of masked filler tokens, which contribute
nothing. The loops run over sequences; tokens are copied as arrays.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.config.rollout import EngineLogprobs
from megatron_oreal.data.context import chunk_lengths, context_part
from megatron_oreal.types import Batch, Float32Array, Microbatch, TrainingSequence, no_logprobs

# Ranks are balanced by tokens alone while the pairs of the longest sequence cost less than this share of its tokens.
MIN_PAIR_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """The limits that the parallel layout and the model set for micro-batches."""

    data_rank: int
    data_size: int  # number of data-parallel ranks
    microbatch_tokens: int  # upper bound; a single sequence longer than this gets its own micro-batch
    # Every micro-batch's length on a rank is a multiple of this: sequence parallelism splits it.
    token_multiple: int = 1
    count_multiple: int = 1  # the number of micro-batches is a multiple of this: interleaved pipelines need it
    equal_lengths: bool = False  # pads all micro-batches to the rank's longest: interleaved pipelines need it
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    engine_logprobs: EngineLogprobs = "model"  # which of the engine's log-probs the losses compare with
    # A sequence of n tokens costs n + pair_cost n^2: what a token attends to grows with its position. 0 counts tokens.
    pair_cost: float = 0.0
    context_rank: int = 0
    context_size: int = 1  # number of ranks that share the tokens of each micro-batch: context parallelism


def pack(sequences: Sequence[TrainingSequence], plan: PackingPlan) -> Batch:
    """Packs this data-parallel rank's share of all ranks' sequences. The counts of the batch are global."""
    return pack_parts([sequences], plan)[0]


def pack_parts(parts: Sequence[Sequence[TrainingSequence]], plan: PackingPlan) -> list[Batch]:
    """Packs each part into a batch of its own, so that it can be a mini-batch; `merge` joins batches again."""
    packed = [own_bins(sequences, plan) for sequences in parts]
    longest = max(padded_length(bin_, plan) for bins in packed for bin_ in bins) if plan.equal_lengths else None
    batches = [build_batch(sequences, bins, longest, plan) for sequences, bins in zip(parts, packed, strict=True)]
    if plan.context_size > 1:
        split_context([microbatch for batch in batches for microbatch in batch.microbatches], plan)
    for batch in batches:
        for microbatch in batch.microbatches:
            to_device(microbatch, plan.device)
    return batches


def split_context(microbatches: Sequence[Microbatch], plan: PackingPlan) -> None:
    """Fills `part` of every micro-batch, which is on the host."""
    limits = (plan.context_size, plan.token_multiple)
    chunks = [chunk_lengths(microbatch.lengths, *limits) for microbatch in microbatches]
    if plan.equal_lengths:
        longest = 2 * max(map(sum, chunks))
        chunks = [chunk_lengths(microbatch.lengths, *limits, longest) for microbatch in microbatches]
    for microbatch, own in zip(microbatches, chunks, strict=True):
        microbatch.part = context_part(microbatch, own, plan.context_rank, plan.context_size)


def merge(batches: Sequence[Batch]) -> Batch:
    """Joins batches: the micro-batches of all, and the sums of their counts."""
    return Batch(
        microbatches=[microbatch for batch in batches for microbatch in batch.microbatches],
        num_sequences=sum(batch.num_sequences for batch in batches),
        num_tokens=sum(batch.num_tokens for batch in batches),
        num_correct_tokens=sum(batch.num_correct_tokens for batch in batches),
        num_incorrect_tokens=sum(batch.num_incorrect_tokens for batch in batches),
        num_correct_sequences=sum(batch.num_correct_sequences for batch in batches),
        num_padding_tokens=sum(batch.num_padding_tokens for batch in batches),
    )


def own_bins(sequences: Sequence[TrainingSequence], plan: PackingPlan) -> list[list[TrainingSequence]]:
    """Lists the sequences of each of this rank's micro-batches."""
    token_counts = [sequence.num_tokens for sequence in sequences]
    matters = plan.pair_cost * max(token_counts, default=0) >= MIN_PAIR_SHARE
    pair_cost = plan.pair_cost if matters else 0.0
    assignment = assign(token_counts, plan.data_size, plan.microbatch_tokens, plan.count_multiple, pair_cost)
    return [[sequences[i] for i in bin_] for bin_ in assignment[plan.data_rank]]


def build_batch(
    sequences: Sequence[TrainingSequence], bins: list[list[TrainingSequence]], length: int | None, plan: PackingPlan
) -> Batch:
    """Builds the micro-batches of `bins`, all of `length` tokens; with None, each is as long as it needs to be."""
    lengths = [length or padded_length(bin_, plan) for bin_ in bins]
    microbatches = [build_microbatch(bin_, length, plan) for bin_, length in zip(bins, lengths, strict=True)]
    trained = [(len(sequence.response_ids), sequence.is_correct) for sequence in sequences]
    return Batch(
        microbatches=microbatches,
        num_sequences=len(sequences),
        num_tokens=sum(length for length, _ in trained),
        num_correct_tokens=sum(length for length, correct in trained if correct),
        num_incorrect_tokens=sum(length for length, correct in trained if not correct),
        num_correct_sequences=sum(correct for _, correct in trained),
        num_padding_tokens=sum(lengths) - sum(sequence.num_tokens for bin_ in bins for sequence in bin_),
    )


def assign(
    lengths: Sequence[int], num_ranks: int, capacity: int, count_multiple: int = 1, pair_cost: float = 0.0
) -> list[list[list[int]]]:
    """Assigns sequences, given by their lengths: [rank][micro-batch] -> sequence numbers.

    The longest sequence goes first, each to the rank with the least cost so far (see PackingPlan.pair_cost). Ranks have
    equally many micro-batches. Example: lengths 1, 2, 3, 4 over 2 ranks with room for 10 tokens and a pair_cost of 0
    -> [[[0, 3]], [[1, 2]]].
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    costs = [length + pair_cost * length * length for length in lengths]
    loads = [(0.0, rank) for rank in range(num_ranks)]  # a heap: the rank with the least cost comes first
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, lightest = loads[0]
        ranks[lightest].append(number)
        heapq.heapreplace(loads, (load + costs[number], lightest))
    packed = [first_fit(numbers, lengths, capacity) for numbers in ranks]
    count = max(1, *(len(bins) for bins in packed))
    count = -(-count // count_multiple) * count_multiple
    return [[sorted(bin_) for bin_ in bins] + [[] for _ in range(count - len(bins))] for bins in packed]


def first_fit(numbers: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Puts each sequence into the first micro-batch that has room for it, or into a new one if none has."""
    bins: list[list[int]] = []
    room = np.full(len(numbers), capacity)
    for number in numbers:
        fits = room[: len(bins)] >= lengths[number]
        index = int(fits.argmax()) if fits.any() else len(bins)
        if index == len(bins):
            bins.append([])
        bins[index].append(number)
        room[index] -= lengths[number]
    return bins


def padded_length(sequences: Sequence[TrainingSequence], plan: PackingPlan) -> int:
    used = sum(sequence.num_tokens for sequence in sequences) or 2  # a micro-batch of filler alone has two tokens
    return used + -used % plan.token_multiple


def engine_logprobs_of(sequence: TrainingSequence, plan: PackingPlan) -> Float32Array:
    """Returns the engine's log-probs in the distribution that is trained, or an empty array if they are unknown."""
    return {
        "model": sequence.model_logprobs,
        "rollout": sequence.rollout_logprobs,
        "unknown": no_logprobs(),
    }[plan.engine_logprobs]


def build_microbatch(sequences: Sequence[TrainingSequence], total: int, plan: PackingPlan) -> Microbatch:
    """Builds a micro-batch of `total` tokens: the sequences, and a segment of masked filler tokens up to `total`."""
    lengths = [sequence.num_tokens for sequence in sequences]
    padding = total - sum(lengths)
    lengths += [padding] if padding else []
    borders = [0, *accumulate(lengths)]
    input_ids, position_ids, sequence_ids = (torch.zeros(total, dtype=torch.int64) for _ in range(3))
    loss_mask = torch.zeros(total, dtype=torch.bool)
    advantages, engine_logprobs = (torch.zeros(total, dtype=torch.float32) for _ in range(2))
    positions = torch.arange(max(lengths))
    for number, (begin, end) in enumerate(pairwise(borders)):
        position_ids[begin:end] = positions[: end - begin]
        sequence_ids[begin:end] = number
    places = []  # for each sequence, the trained tokens' indices in its response
    for begin, sequence in zip(borders, sequences, strict=False):
        known = engine_logprobs_of(sequence, plan)
        assert len(sequence.prompt_ids), "the first response token is predicted by the last prompt token"
        assert len(known) in (0, len(sequence.response_ids)), "there is a log-prob for each response token, or for none"
        response, end = begin + len(sequence.prompt_ids), begin + sequence.num_tokens
        input_ids.numpy()[begin:end] = sequence.token_ids
        # Position t predicts token t + 1, so training covers the last prompt token to the last token but one.
        trained = slice(response - 1, end - 1)
        loss_mask[trained] = True
        advantages[trained] = sequence.advantage
        engine_logprobs.numpy()[trained] = known if len(known) else math.nan
        places.append(positions[: end - response])
    is_correct = torch.tensor([sequence.is_correct for sequence in sequences] + [False] * bool(padding))
    trained_tokens = loss_mask.nonzero()[:, 0]
    of_correct = is_correct[sequence_ids[trained_tokens]]
    trained_places = torch.cat(places) if places else trained_tokens
    return Microbatch(
        input_ids=input_ids,
        labels=input_ids.roll(-1),
        position_ids=position_ids,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_mask=loss_mask,
        sequence_ids=sequence_ids,
        advantages=advantages,
        is_correct=is_correct,
        engine_logprobs=engine_logprobs,
        lengths=tuple(lengths),
        trained=trained_tokens,
        trained_correct=trained_tokens[of_correct],
        trained_incorrect=trained_tokens[~of_correct],
        trained_places=trained_places,
        longest_response=int(trained_places.max()) + 1 if len(trained_places) else 1,
    )


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    if device.type != "cpu":
        for name in Microbatch.__slots__:
            value = getattr(microbatch, name)
            if isinstance(value, Tensor):
                setattr(microbatch, name, copy_to_device(value, device))
        if microbatch.part is not None:
            to_device(microbatch.part.tokens, device)
            microbatch.part.restore = copy_to_device(microbatch.part.restore, device)
    return microbatch


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies from pinned memory, so that the copy does not wait for the GPU's running work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad_responses(values: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Turns per-token values [T] into [N, longest response]; also returns the mask of response tokens."""
    shape = (microbatch.num_sequences, microbatch.longest_response)
    slots = response_slots(microbatch)
    padded = torch.zeros(shape, dtype=values.dtype, device=values.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=values.device)
    padded.view(-1).index_copy_(0, slots, values.index_select(0, microbatch.trained))
    mask.view(-1).index_fill_(0, slots, True)
    return padded, mask


def unpad_responses(padded: Tensor, microbatch: Microbatch) -> Tensor:
    """Inverts pad_responses: [N, longest] -> [T], 0 outside the loss mask."""
    values = torch.zeros(len(microbatch.labels), dtype=padded.dtype, device=padded.device)
    return values.index_copy_(0, microbatch.trained, padded.reshape(-1).index_select(0, response_slots(microbatch)))


def response_slots(microbatch: Microbatch) -> Tensor:
    """Returns [T'] int64: the position of each trained token in a flattened [N, longest response]."""
    sequences = microbatch.sequence_ids.index_select(0, microbatch.trained)
    return sequences * microbatch.longest_response + microbatch.trained_places
