"""Records the tokens of responses with the values that training has for each: log-probs, weights and advantages.

The trainer's values are in the micro-batches of an update, which have another order and differ between data-parallel
ranks. A sequence is recognised by its tokens, because equal sequences have equal values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from megatron_oreal.config.rollout import EngineLogprobs
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.types import Batch, Float32Array, Group, Int32Array, Microbatch, Sample, no_logprobs

SequenceKey = tuple[int, bytes]  # the number of prompt tokens, and the bytes of all tokens
Decode = Callable[[Int32Array], str]
# Tokens before a token that are decoded with it, because a tokenizer may drop the space at the beginning of a text.
CONTEXT_TOKENS = 4
MAX_BYTES_OF_CHARACTER = 4  # in UTF-8; up to this many tokens may share a character


@dataclass(slots=True, frozen=True)
class TokenValues:
    """The values of each token of a response in an update; an array is empty if its values are unknown."""

    old_logprobs: Float32Array  # [R] the trainer's, before the update
    engine_logprobs: Float32Array  # [R] of the trained distribution; NaN where they are unknown
    weights: Float32Array  # [R] the algorithm's token weights
    advantages: Float32Array  # [R]


def key_of(prompt_ids: Int32Array, response_ids: Int32Array) -> SequenceKey:
    return len(prompt_ids), np.concatenate([prompt_ids, response_ids]).astype(np.int32).tobytes()


def sample_key(sample: Sample) -> SequenceKey:
    return key_of(sample.prompt_ids, sample.response_ids)


def trained_values(batches: Iterable[Batch], wanted: set[SequenceKey]) -> dict[SequenceKey, TokenValues]:
    """Returns the values of the wanted sequences in this rank's micro-batches."""
    found: dict[SequenceKey, TokenValues] = {}
    for batch in batches:
        for microbatch in batch.microbatches:
            found |= microbatch_values(microbatch, wanted)
    return found


def microbatch_values(microbatch: Microbatch, wanted: set[SequenceKey]) -> dict[SequenceKey, TokenValues]:
    input_ids = microbatch.input_ids.cpu().numpy().astype(np.int32)
    loss_mask = microbatch.loss_mask.cpu().numpy()
    known: dict[str, torch.Tensor | None] = {
        "old_logprobs": microbatch.old_logprobs,
        "engine_logprobs": microbatch.engine_logprobs,
        "weights": microbatch.token_weights,
        "advantages": microbatch.advantages,
    }
    streams = {
        name: None if stream is None else stream.detach().float().cpu().numpy() for name, stream in known.items()
    }
    found = {}
    for begin, end in pairwise(microbatch.cu_seqlens.tolist()):
        trained = begin + np.flatnonzero(loss_mask[begin:end])
        if len(trained) == 0:  # This is the filler, or a response without a token.
            continue
        response = trained[0] + 1  # Position t predicts token t + 1.
        key = key_of(input_ids[begin:response], input_ids[response:end])
        if key in wanted:
            taken = {name: no_logprobs() if s is None else s[trained].copy() for name, s in streams.items()}
            found[key] = TokenValues(**taken)
    return found


def write_token_records(
    path: Path,
    groups: Sequence[Group],
    values: Mapping[SequenceKey, TokenValues],
    decode: Decode,
    engine_logprobs: EngineLogprobs,
) -> None:
    """Writes one JSON object for each sample of `groups`, the first groups of the step, in the order of its rollouts.

    `row` is the number of the sample's line in the step's file of rollouts, counted from 0.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [sample for group in groups for sample in group.samples]
    rows = (
        {"row": row} | token_row(sample, values.get(sample_key(sample)), decode, engine_logprobs)
        for row, sample in enumerate(samples)
    )
    write_atomically(path, "".join(json.dumps(row, allow_nan=False, separators=(",", ":")) + "\n" for row in rows))


def token_row(
    sample: Sample, trained: TokenValues | None, decode: Decode, engine_logprobs: EngineLogprobs
) -> dict[str, object]:
    """Returns the tokens' texts and values; leaves out unknown ones.

    `logprobs` are the engine's. Add `differences` to get the trainer's.
    """
    row: dict[str, object] = {"texts": token_texts(sample.response_ids, decode)}
    logprobs = sample.model_logprobs if engine_logprobs == "model" else sample.rollout_logprobs
    if len(logprobs):
        row["logprobs"] = rounded(logprobs)
    if trained is None:
        return row
    if len(trained.old_logprobs):
        differences = trained.old_logprobs - trained.engine_logprobs
        if np.isfinite(differences).any():
            row["differences"] = rounded(differences)
    if len(trained.weights):
        row["weights"] = rounded(trained.weights)
    if len(trained.advantages):
        advantages = rounded(trained.advantages)
        row["advantages"] = advantages[:1] if len(set(advantages)) == 1 else advantages
    return row


def rounded(values: Float32Array) -> list[float | None]:
    """Keeps four significant digits of each number; None replaces non-finite numbers."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def token_texts(ids: Int32Array, decode: Decode) -> list[str]:
    """Returns a text for each token; their concatenation is the text of all.

    If tokens share a character, the last one gets it, and the texts of the others are empty.
    """
    texts: list[str] = []
    begin, seen = 0, ""  # earlier tokens have the text of ids[begin:index]
    for index in range(len(ids)):
        text = decode(ids[begin : index + 1])
        num_pending = num_empty_at_end(texts)
        is_split = text.endswith("\ufffd") and index + 1 < len(ids) and num_pending < MAX_BYTES_OF_CHARACTER
        if is_split:
            texts.append("")
            continue
        # Bytes that did not form a character may form one with those of a later token.
        known = seen if text.startswith(seen) else seen.rstrip("\ufffd")
        texts.append(text[len(known) :])
        begin = max(begin, index + 1 - CONTEXT_TOKENS)
        seen = decode(ids[begin : index + 1])
    return texts


def num_empty_at_end(texts: Sequence[str]) -> int:
    count = 0
    for text in reversed(texts[-MAX_BYTES_OF_CHARACTER:]):
        if text:
            break
        count += 1
    return count
