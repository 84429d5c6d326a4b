"""Decodes one wave of requests in lockstep on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams
from megatron_oreal.engines.local.token_sampling import draw_with, seed_tensor, uniforms_of_positions
from megatron_oreal.engines.stop_strings import Decode, holds_stop, tail_length, tokens_to_stop_string
from megatron_oreal.types import Int32Array

# The batch drops finished rows when at most this share of its rows is live, because copying the cache is cheap.
DROP_BELOW = 0.9
# The number of tokens between two checks for finished rows. On a GPU a check waits for all launched work.
TOKENS_BETWEEN_LOOKS = {"cuda": 8, "cpu": 1}


class Decoding(Protocol):
    def advance(self, token_ids: Tensor) -> Tensor:
        """Appends token_ids [B]; returns the logits [B, V] of the next tokens."""

    def keep(self, rows: Tensor) -> None:
        """Drops all rows except `rows`, indices into [B]."""


class Decoder(Protocol):
    vocab_size: int
    parameters: dict[str, Tensor]  # writable, by Hugging Face name

    def bytes_of_row(self, num_tokens: int) -> int:
        """Returns the device bytes of one row that is decoded to `num_tokens` tokens, including its prompt."""

    def start(
        self, prompt_ids: Tensor, num_padding: Tensor, prompt_of_row: Tensor, max_length: int | None = None
    ) -> tuple[Tensor, Decoding]:
        """Starts with prompts [U, P], num_padding [U], prompt_of_row [B]; returns logits [B, V] and the decoding.

        max_length: upper bound of a row's tokens, including its prompt.
        """


@dataclass(slots=True, frozen=True)
class Responses:
    """The responses of a wave, padded to the longest. Values beyond a row's length are undefined."""

    token_ids: Tensor  # [N, L] int64
    rollout_logprobs: Tensor  # [N, L] float32
    model_logprobs: Tensor  # [N, L] float32
    lengths: Tensor  # [N] int64


NO_RESPONSES = Responses(torch.zeros(0, 0).long(), torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0).long())


@torch.inference_mode()
def decode_wave(
    decoder: Decoder,
    requests: Sequence[GenerationRequest],
    params: SamplingParams,
    device: torch.device,
    decode: Decode | None = None,
) -> Responses:
    """Decodes all requests in lockstep, with one prefill per prompt; finished rows leave the batch.

    decode: lets rows end at stop strings. Without it they continue.
    """
    keys = [request.prompt_ids.tobytes() for request in requests]
    prompts = {key: request.prompt_ids for key, request in zip(keys, requests, strict=True)}
    row_of_prompt = {key: row for row, key in enumerate(prompts)}
    prompt_of_row = torch.tensor([row_of_prompt[key] for key in keys], device=device)
    prompt_ids, num_padding = pad_left(list(prompts.values()), device)
    rows = Rows.begin(requests, params, device)
    longest = max(params.longest_response(len(request.prompt_ids)) for request in requests)
    wave = Responses(
        token_ids=torch.zeros(longest, len(requests), dtype=torch.int64, device=device),
        rollout_logprobs=torch.zeros(longest, len(requests), dtype=torch.float32, device=device),
        model_logprobs=torch.zeros(longest, len(requests), dtype=torch.float32, device=device),
        lengths=rows.lengths.clone(),
    )  # [L, N] until all rows have finished
    max_length = prompt_ids.shape[1] + longest
    logits, decoding = decoder.start(prompt_ids, num_padding, prompt_of_row, max_length)
    look_every = TOKENS_BETWEEN_LOOKS[device.type]
    uniform = torch.empty(0, 0)
    can_end_early = bool(params.stop_token_ids or params.stop_strings) or params.max_total_tokens is not None
    for position in range(longest):
        if position % look_every == 0:
            count = min(look_every, longest - position)
            uniform = uniforms_of_positions(rows.seeds, position, count)
        draws = draw_with(logits, uniform[position % look_every], params)
        next_ids = draws.token_ids
        wave.token_ids[position].index_copy_(0, rows.numbers, next_ids)
        wave.rollout_logprobs[position].index_copy_(0, rows.numbers, draws.rollout_logprobs)
        wave.model_logprobs[position].index_copy_(0, rows.numbers, draws.model_logprobs)
        if can_end_early:
            rows.stop(next_ids, position)
            if (position + 1) % look_every == 0:
                if decode is not None and params.stop_strings:
                    end_at_stop_strings(rows, wave.token_ids[: position + 1], look_every, params.stop_strings, decode)
                kept = rows.live()
                if len(kept) == 0:
                    break
                if len(kept) <= DROP_BELOW * len(rows.numbers):
                    kept = kept.to(device, non_blocking=True)
                    wave.lengths.index_copy_(0, rows.numbers, rows.lengths)
                    rows, next_ids = rows.only(kept), next_ids.index_select(0, kept)
                    decoding.keep(kept)
        if position + 1 < longest:
            logits = decoding.advance(next_ids)
    wave.lengths.index_copy_(0, rows.numbers, rows.lengths)
    longest = int(wave.lengths.max())
    return Responses(
        token_ids=wave.token_ids[:longest].T,
        rollout_logprobs=wave.rollout_logprobs[:longest].T,
        model_logprobs=wave.model_logprobs[:longest].T,
        lengths=wave.lengths,
    )


@dataclass(slots=True, frozen=True)
class Rows:
    """The rows under way: B of the N rows of a wave. Finished rows stay until the next check."""

    numbers: Tensor  # [B] int64, rising indices into [N]
    seeds: Tensor  # [B] int64
    lengths: Tensor  # [B] int64: of the response with its stop token; the limit until the row stops
    limits: Tensor | None  # [B] int64: the longest allowed, if rows differ
    is_live: Tensor  # [B] bool
    stop_ids: Tensor  # int64

    @staticmethod
    def begin(requests: Sequence[GenerationRequest], params: SamplingParams, device: torch.device) -> Rows:
        limits = [params.longest_response(len(request.prompt_ids)) for request in requests]
        lengths = torch.tensor(limits, dtype=torch.int64, device=device)
        return Rows(
            numbers=torch.arange(len(requests), device=device),
            seeds=seed_tensor([request.seed for request in requests], device),
            lengths=lengths,
            limits=None if params.max_total_tokens is None else lengths.clone(),
            is_live=torch.ones(len(requests), dtype=torch.bool, device=device),
            stop_ids=torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device),
        )

    def stop(self, token_ids: Tensor, position: int) -> None:
        """Marks the rows that end with the token at `position`; does not wait for the device."""
        has_stopped = (token_ids[:, None] == self.stop_ids).any(dim=1)
        if self.limits is not None:
            has_stopped |= self.limits == position + 1
        has_stopped.logical_and_(self.is_live)
        self.lengths.masked_fill_(has_stopped, position + 1)
        self.is_live.logical_and_(~has_stopped)

    def live(self) -> Tensor:
        """Returns the indices into [B] of the live rows, on the host. Waits for the device."""
        return self.is_live.cpu().nonzero()[:, 0]

    def only(self, kept: Tensor) -> Rows:
        """Selects rows. kept: rising indices into [B]."""
        return Rows(
            numbers=self.numbers.index_select(0, kept),
            seeds=self.seeds.index_select(0, kept),
            lengths=self.lengths.index_select(0, kept),
            limits=None if self.limits is None else self.limits.index_select(0, kept),
            is_live=self.is_live.index_select(0, kept),
            stop_ids=self.stop_ids,
        )


def end_at_stop_strings(
    rows: Rows, token_ids: Tensor, num_new: int, stop_strings: Sequence[str], decode: Decode
) -> None:
    """Ends the live rows whose last tokens complete a stop string. Waits for the device.

    token_ids: [tokens so far, N], of which the last `num_new` have not been checked. The function decodes the last
    tokens first, and the whole response only if they contain a stop string. The sampler finds those that this check
    misses.
    """
    tail = token_ids[-tail_length(stop_strings, num_new) :].T.int().cpu().numpy()
    live, numbers = rows.live().tolist(), rows.numbers.tolist()
    for row in live:
        if not holds_stop(tail[numbers[row]], stop_strings, decode):
            continue
        ids = token_ids[:, numbers[row]].int().cpu().numpy()
        length = tokens_to_stop_string(ids, stop_strings, decode)
        if length is not None:
            rows.lengths[row] = length
            rows.is_live[row] = False


def pad_left(prompts: Sequence[Int32Array], device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns token ids [U, P] with zeros before the shorter prompts, and the numbers of these zeros [U]."""
    length = max(map(len, prompts))
    padded = np.zeros((len(prompts), length), dtype=np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    num_padding = [length - len(prompt) for prompt in prompts]
    return torch.from_numpy(padded).to(device), torch.tensor(num_padding, device=device)


def to_generations(responses: Responses, params: SamplingParams, decode: Decode | None = None) -> list[Generation]:
    """Builds the responses. Raises FloatingPointError for a non-finite log-prob, which means a broken model."""
    is_generated = (
        torch.arange(responses.token_ids.shape[1], device=responses.lengths.device) < responses.lengths[:, None]
    )
    if not (responses.model_logprobs.isfinite() | ~is_generated).all():
        raise FloatingPointError("the model's logits are not finite: the weights are broken")
    token_ids = responses.token_ids.int().cpu().numpy()
    rollout, model = responses.rollout_logprobs.cpu().numpy(), responses.model_logprobs.cpu().numpy()
    generations = []
    for row, length in enumerate(responses.lengths.tolist()):
        # These are copies, so that the padded arrays of all rows can be freed.
        ids = token_ids[row, :length].copy()
        logprobs = rollout[row, :length].copy(), model[row, :length].copy()
        stopped = length > 0 and int(ids[-1]) in params.stop_token_ids
        if decode is not None and params.stop_strings and not stopped:
            stopped = holds_stop(ids, params.stop_strings, decode)
        generations.append(Generation(ids, *logprobs, finish_reason="stop" if stopped else "length"))
    return generations
