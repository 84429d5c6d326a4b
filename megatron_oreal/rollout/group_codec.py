"""Encodes groups as one flat buffer of 32-bit integers, and decodes them.

The buffer holds, in this order: the number of groups; 3 integers for each group; 6 integers for each sample; the
response ids of all samples; their policy versions; their rollout log-probs; their model log-probs. Floats are stored as
their bits. The buffer leaves out what every rank knows (the prompts) and what only the first rank needs (texts,
extracted answers). Encoding and decoding loop over samples, never over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.types import (
    FinishReason,
    Float32Array,
    Group,
    Int32Array,
    Sample,
    Verdict,
    VerdictStatus,
)

FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)
STATUSES: tuple[VerdictStatus, ...] = get_args(VerdictStatus)
NO_VERDICT = -1


@dataclass(slots=True)
class NumberedGroup:
    """A group and the index of its prompt, by which the other ranks find the prompt.

    Example: NumberedGroup(17, Group(prompts[17].prompt, samples)).
    """

    prompt_number: int  # index in the list of prompts that all ranks have
    group: Group
    is_chosen: bool = True  # whether the step trains on it


def pack(groups: Sequence[NumberedGroup]) -> Tensor:
    """Returns int32 numbers in the order of the module's description; `unpack` is the inverse."""
    samples = [sample for numbered in groups for sample in numbered.group.samples]
    heads = [[numbered.prompt_number, len(numbered.group.samples), numbered.is_chosen] for numbered in groups]
    parts = [
        np.array([len(groups)], dtype=np.int32),
        np.array(heads, dtype=np.int32).ravel(),
        np.array([sample_head(sample) for sample in samples], dtype=np.int32).ravel(),
        *(sample.response_ids for sample in samples),
        *(sample.policy_versions for sample in samples),
        *(sample.rollout_logprobs.view(np.int32) for sample in samples),
        *(sample.model_logprobs.view(np.int32) for sample in samples),
    ]
    return torch.from_numpy(np.concatenate(parts))


def sample_head(sample: Sample) -> list[int]:
    """Returns number of tokens, flags of the known arrays, finish reason, status, policy version and reward."""
    known = [len(array) > 0 for array in (sample.policy_versions, sample.rollout_logprobs, sample.model_logprobs)]
    return [
        len(sample.response_ids),
        known[0] | known[1] << 1 | known[2] << 2,
        FINISH_REASONS.index(sample.finish_reason),
        NO_VERDICT if sample.verdict is None else STATUSES.index(sample.verdict.status),
        sample.policy_version,
        0 if sample.verdict is None else int(np.float32(sample.verdict.reward).view(np.int32)),
    ]


class Reader:
    """Reads the parts that `pack` wrote, from the front of the buffer. The arrays are views, not copies."""

    def __init__(self, packed: Tensor) -> None:
        self.rest: Int32Array = packed.cpu().numpy()

    def table(self, num_rows: int, num_columns: int) -> list[list[int]]:
        rows: list[list[int]] = self._take(num_rows * num_columns).reshape(num_rows, num_columns).tolist()
        return rows

    def integers(self, lengths: Sequence[int]) -> Iterator[Int32Array]:
        return iter([self._take(length) for length in lengths])

    def floats(self, lengths: Sequence[int]) -> Iterator[Float32Array]:
        return iter([self._take(length).view(np.float32) for length in lengths])

    def _take(self, count: int) -> Int32Array:
        taken, self.rest = self.rest[:count], self.rest[count:]
        return taken


def unpack(packed: Tensor, prompts: Sequence[EncodedPrompt]) -> list[NumberedGroup]:
    """Returns what `pack` received, without texts and extracted answers. `prompts`: the list of all prompts."""
    reader = Reader(packed)
    ((num_groups,),) = reader.table(1, 1)
    group_heads = reader.table(num_groups, 3)
    heads = reader.table(sum(size for _, size, _ in group_heads), 6)
    ids = reader.integers([head[0] for head in heads])
    versions = reader.integers([head[0] * (head[1] & 1) for head in heads])
    rollout_logprobs = reader.floats([head[0] * (head[1] >> 1 & 1) for head in heads])
    model_logprobs = reader.floats([head[0] * (head[1] >> 2) for head in heads])
    rows = iter(heads)
    groups = []
    for number, size, is_chosen in group_heads:
        prompt = prompts[number]
        samples = []
        for _ in range(size):
            _, _, finish_reason, status, version, reward = next(rows)
            verdict = None
            if status != NO_VERDICT:
                verdict = Verdict(float(np.int32(reward).view(np.float32)), STATUSES[status], None)
            sample = Sample(
                prompt_id=prompt.prompt.id,
                prompt_ids=prompt.token_ids,
                response_ids=next(ids),
                response_text="",
                rollout_logprobs=next(rollout_logprobs),
                model_logprobs=next(model_logprobs),
                finish_reason=FINISH_REASONS[finish_reason],
                policy_version=version,
                verdict=verdict,
                policy_versions=next(versions),
            )
            samples.append(sample)
        groups.append(NumberedGroup(number, Group(prompt.prompt, samples), bool(is_chosen)))
    return groups
