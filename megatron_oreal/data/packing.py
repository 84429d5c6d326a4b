"""Sequences to packed micro-batches, balanced over data-parallel ranks. Pure: every rank computes the same plan.

Each sequence is trained exactly once, whatever the number of ranks: ranks and micro-batches that are left without one
get a filler of masked tokens, which contributes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    loads = [0] * num_ranks
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = min(range(num_ranks), key=lambda rank: (loads[rank], rank))
        ranks[lightest].append(number)
        loads[lightest] += lengths[number]
    packed = [first_fit(numbers, lengths, capacity) for numbers in ranks]
    count = max(1, *(len(bins) for bins in packed))
    count = -(-count // count_multiple) * count_multiple
    return [[sorted(bin_) for bin_ in bins] + [[] for _ in range(count - len(bins))] for bins in packed]


def first_fit(numbers: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    filled: list[int] = []
    for number in numbers:
        for index, tokens in enumerate(filled):
            if tokens + lengths[number] <= capacity:
                bins[index].append(number)
                filled[index] += lengths[number]
                break
        else:
            bins.append([number])
            filled.append(lengths[number])
    return bins


def padded_length(sequences: Sequence[TrainingSequence], plan: PackingPlan) -> int:
    used = sum(sequence.num_tokens for sequence in sequences) or 2
    return used + -used % plan.token_multiple


def build_microbatch(sequences: Sequence[TrainingSequence], total: int, device: torch.device) -> Microbatch:
    """`total` tokens: the sequences, and one segment of masked filler where they are fewer."""
    tokens = [sequence.prompt_ids + sequence.response_ids for sequence in sequences]
    used = sum(len(ids) for ids in tokens)
    padding = total - used
    lengths = [len(ids) for ids in tokens] + ([padding] if padding else [])
    input_ids = torch.zeros(total, dtype=torch.int64)
    input_ids[:used] = torch.tensor([token for ids in tokens for token in ids], dtype=torch.int64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    sequence_ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position_ids = torch.arange(total) - cu_seqlens[sequence_ids]
    prompt_lengths = torch.tensor([len(sequence.prompt_ids) for sequence in sequences] + [total] * bool(padding))
    # The token at position t predicts t + 1: trained from the last prompt token to the one before the end.
    loss_mask = (position_ids >= prompt_lengths[sequence_ids] - 1) & (
        position_ids < torch.tensor(lengths)[sequence_ids] - 1
    )
    advantages = torch.tensor([sequence.advantage for sequence in sequences] + [0.0] * bool(padding))
    logprobs = [value for sequence in sequences for value in known_logprobs(sequence)]
    engine_logprobs = torch.zeros(total, dtype=torch.float32)
    engine_logprobs[loss_mask] = torch.tensor(logprobs, dtype=torch.float32)
    is_correct = torch.tensor([sequence.is_correct for sequence in sequences] + [False] * bool(padding))
    trained = loss_mask.nonzero()[:, 0]
    trained_sequences = sequence_ids[trained]
    places = position_ids[trained] - (prompt_lengths[trained_sequences] - 1).clamp_min(0)
    microbatch = Microbatch(
        input_ids=input_ids,
        labels=input_ids.roll(-1),
        position_ids=position_ids,
        cu_seqlens=cu_seqlens.int(),
        max_seqlen=max(lengths),
        loss_mask=loss_mask,
        sequence_ids=sequence_ids,
        advantages=torch.where(loss_mask, advantages[sequence_ids], 0.0),
        is_correct=is_correct,
        engine_logprobs=engine_logprobs,
        lengths=tuple(lengths),
        trained=trained,
        trained_correct=trained[is_correct[trained_sequences]],
        trained_incorrect=trained[~is_correct[trained_sequences]],
        trained_places=places,
        longest_response=int(places.max()) + 1 if len(places) else 1,
    )
    return to_device(microbatch, device)


def known_logprobs(sequence: TrainingSequence) -> list[float]:
    return sequence.model_logprobs or [math.nan] * len(sequence.response_ids)


def to_device(microbatch: Microbatch, device: torch.device) -> Microbatch:
    if device.type != "cpu":
        for name in Microbatch.__slots__:
            value = getattr(microbatch, name)
            if isinstance(value, Tensor):
                setattr(microbatch, name, copy_to_device(value, device))
    return microbatch


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """From pinned memory: such a copy does not wait for what a GPU is doing."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pad_responses(values: Tensor, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    """Per-token values [T] -> [N, longest response], and the mask of what is a response token there."""
    shape = (microbatch.num_sequences, microbatch.longest_response)
    slots = response_slots(microbatch)
    padded = torch.zeros(shape, dtype=values.dtype, device=values.device)
    mask = torch.zeros(shape, dtype=torch.bool, device=values.device)
    padded.view(-1).index_copy_(0, slots, values.index_select(0, microbatch.trained))
    mask.view(-1).index_fill_(0, slots, True)
    return padded, mask


def unpad_responses(padded: Tensor, microbatch: Microbatch) -> Tensor:
    """The inverse of pad_responses: [N, longest] -> [T], 0 outside the loss mask."""
    values = torch.zeros(len(microbatch.labels), dtype=padded.dtype, device=padded.device)
    return values.index_copy_(0, microbatch.trained, padded.reshape(-1).index_select(0, response_slots(microbatch)))


def response_slots(microbatch: Microbatch) -> Tensor:
    """[T'] int64: where each trained token stands in a flattened [N, longest response]."""
    sequences = microbatch.sequence_ids.index_select(0, microbatch.trained)
    return sequences * microbatch.longest_response + microbatch.trained_places
