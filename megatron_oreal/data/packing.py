"""Sequences to packed micro-batches, balanced over data-parallel ranks. Pure: every rank computes the same plan.

Each sequence is trained exactly once, whatever the number of ranks: ranks and micro-batches that are left without one
get a filler of masked tokens, which contributes nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.types import Batch, Microbatch, TrainingSequence


@dataclass(frozen=True, slots=True)
class PackingPlan:
    """What packing has to know of the parallel layout and the model's limits."""

    data_rank: int
    data_size: int
    microbatch_tokens: int  # at most, but for a longer sequence, which is alone
    token_multiple: int = 1  # of every micro-batch's length, for sequence parallelism
    count_multiple: int = 1  # of the number of micro-batches, for interleaved pipelines
    equal_lengths: bool = False  # micro-batches padded to the rank's longest, for interleaved pipelines
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def pack(sequences: Sequence[TrainingSequence], plan: PackingPlan) -> Batch:
    """This data-parallel rank's micro-batches of all ranks' sequences, with the global counts."""
    return pack_parts([sequences], plan)[0]


def pack_parts(parts: Sequence[Sequence[TrainingSequence]], plan: PackingPlan) -> list[Batch]:
    """A batch for each part; `merge` makes one of several."""
    packed = [own_bins(sequences, plan) for sequences in parts]
    longest = max(padded_length(bin_, plan) for bins in packed for bin_ in bins) if plan.equal_lengths else None
    return [build_batch(sequences, bins, longest, plan) for sequences, bins in zip(parts, packed, strict=True)]


def merge(batches: Sequence[Batch]) -> Batch:
    """The micro-batches of all, and the sums of their counts."""
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
    """The sequences of each of this rank's micro-batches."""
    token_counts = [sequence.num_tokens for sequence in sequences]
    assignment = assign(token_counts, plan.data_size, plan.microbatch_tokens, plan.count_multiple)
    return [[sequences[i] for i in bin_] for bin_ in assignment[plan.data_rank]]


def build_batch(
    sequences: Sequence[TrainingSequence], bins: list[list[TrainingSequence]], length: int | None, plan: PackingPlan
) -> Batch:
    """`length`: of every micro-batch; None: as long as each needs."""
    lengths = [length or padded_length(bin_, plan) for bin_ in bins]
    microbatches = [build_microbatch(bin_, length, plan.device) for bin_, length in zip(bins, lengths, strict=True)]
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


def assign(lengths: Sequence[int], num_ranks: int, capacity: int, count_multiple: int = 1) -> list[list[list[int]]]:
    """[rank][micro-batch] -> sequence numbers. Ranks are balanced by tokens and have equally many micro-batches."""
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]  # a heap: the rank with the fewest tokens comes first
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, lightest = loads[0]
        ranks[lightest].append(number)
        heapq.heapreplace(loads, (load + lengths[number], lightest))
    packed = [first_fit(numbers, lengths, capacity) for numbers in ranks]
    count = max(1, *(len(bins) for bins in packed))
    count = -(-count // count_multiple) * count_multiple
    return [[sorted(bin_) for bin_ in bins] + [[] for _ in range(count - len(bins))] for bins in packed]


def first_fit(numbers: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each sequence goes to the first micro-batch that has room for it, or to a new one where none has."""
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
    used = sum(sequence.num_tokens for sequence in sequences) or 2
    return used + -used % plan.token_multiple


def build_microbatch(sequences: Sequence[TrainingSequence], total: int, device: torch.device) -> Microbatch:
    """A micro-batch of `total` tokens: the sequences, and one segment of masked filler where they are shorter."""
    lengths = [sequence.num_tokens for sequence in sequences]
    padding = total - sum(lengths)
    lengths += [padding] if padding else []
    borders = [0, *accumulate(lengths)]
    input_ids, position_ids = (torch.zeros(total, dtype=torch.int64) for _ in range(2))
    loss_mask = torch.zeros(total, dtype=torch.bool)
    advantages, engine_logprobs = (torch.zeros(total, dtype=torch.float32) for _ in range(2))
    for begin, sequence in zip(borders, sequences, strict=False):
        response, end = begin + len(sequence.prompt_ids), begin + sequence.num_tokens
        input_ids.numpy()[begin:response] = sequence.prompt_ids
        input_ids.numpy()[response:end] = sequence.response_ids
        # Position t predicts token t + 1: trained from the last prompt token to the one before the end.
        trained = slice(response - 1, end - 1)
        loss_mask[trained] = True
        advantages[trained] = sequence.advantage
        engine_logprobs.numpy()[trained] = sequence.model_logprobs if len(sequence.model_logprobs) else math.nan
    positions = torch.arange(max(lengths))
    for begin, length in zip(borders, lengths, strict=False):
        position_ids[begin : begin + length] = positions[:length]
    microbatch = Microbatch(
        input_ids=input_ids,
        labels=input_ids.roll(-1),
        position_ids=position_ids,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(lengths),
        loss_mask=loss_mask,
        sequence_ids=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        advantages=advantages,
        is_correct=torch.tensor([sequence.is_correct for sequence in sequences] + [False] * bool(padding)),
        engine_logprobs=engine_logprobs,
    )
    return to_device(microbatch, device)


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    if device.type != "cpu":
        for name in Microbatch.__slots__:
            value = getattr(microbatch, name)
            if isinstance(value, Tensor):
                setattr(microbatch, name, value.to(device, non_blocking=True))
    return microbatch


def response_index(microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """For each trained token, in packed order: its sequence [T'] and its place in the response [T']."""
    trained = microbatch.loss_mask.nonzero()[:, 0]
    sequence = microbatch.sequence_ids[trained]
    first = torch.full((microbatch.num_sequences,), len(microbatch.labels), device=trained.device)
    first = first.scatter_reduce(0, sequence, trained, "amin")
    return sequence, trained - first[sequence]


def pad_responses(values: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Per-token values [T] -> [N, longest response], and the mask of what is a response token there."""
    sequence, place = response_index(microbatch)
    longest = int(place.max()) + 1 if place.numel() else 1
    padded = torch.zeros(microbatch.num_sequences, longest, dtype=values.dtype, device=values.device)
    mask = torch.zeros_like(padded, dtype=torch.bool)
    padded[sequence, place] = values[microbatch.loss_mask]
    mask[sequence, place] = True
    return padded, mask


def unpad_responses(padded: Tensor, microbatch: Microbatch) -> Tensor:
    """The inverse of pad_responses: [N, longest] -> [T], 0 outside the loss mask."""
    sequence, place = response_index(microbatch)
    values = torch.zeros(len(microbatch.labels), dtype=padded.dtype, device=padded.device)
    values[microbatch.loss_mask] = padded[sequence, place]
    return values
