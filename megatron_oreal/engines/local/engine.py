"""The embedded engine: decodes in the trainer's own processes; no server, no port.

Every rank of the process group holds the whole model and decodes its share of the prompts; all ranks get all results.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams, Watch, check_prompts
from megatron_oreal.engines.local.decoder import LLAMA_LIKE, LlamaDecoder
from megatron_oreal.engines.local.token_sampling import draw_with, seed_tensor, uniforms_of_positions
from megatron_oreal.engines.local.transformers_decoder import TransformersDecoder
from megatron_oreal.weights.families import read_architecture
from megatron_oreal.weights.initial import hf_weights
from megatron_oreal.weights.torch_dist_reader import is_torch_dist

LOG = logging.getLogger(__name__)
# Families that the decoder or transformers runs with the weight stream's names; the others are only converted.
GENERATED_FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
# Finished rows are dropped when the live ones are at most this share of the batch: copying the cache is cheap.
DROP_BELOW = 0.9
# Tokens between two looks at which rows have finished: on a GPU a look waits for all that was launched.
TOKENS_BETWEEN_LOOKS = {"cuda": 8, "cpu": 1}
USABLE_SHARE = 0.9  # of the free memory of a GPU, for the rows that are decoded together


class Decoding(Protocol):
    def advance(self, token_ids: Tensor) -> Tensor:
        """Appends token_ids [B]; the logits [B, V] of the next ones."""

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows`, indices into [B]."""


class Decoder(Protocol):
    vocab_size: int
    parameters: dict[str, Tensor]  # writable, by Hugging Face name

    def bytes_of_row(self, num_tokens: int) -> int:
        """Device memory of one row while it is decoded to `num_tokens` tokens, its prompt included."""

    def start(
        self, prompt_ids: Tensor, num_padding: Tensor, prompt_of_row: Tensor, max_length: int | None = None
    ) -> tuple[Tensor, Decoding]:
        """Prompts [U, P] padded on the left by num_padding [U], prompt_of_row [B] -> first logits [B, V], decoding.

        max_length: tokens of a row at most, its prompt included.
        """


def load_decoder(model_path: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    """The lean decoder for families that it fits, transformers' model for the others.

    model_path: a Hugging Face directory, or a torch_dist one with config.json. Raises ValueError naming model.path when
    weights are missing or have the wrong shape.
    """
    try:
        architecture = read_architecture(model_path)
    except ValueError:
        if is_torch_dist(model_path):
            raise
        return TransformersDecoder(model_path, device, dtype)  # a family or a setting that only transformers knows
    decoder: Decoder
    if architecture.family in LLAMA_LIKE:
        decoder = LlamaDecoder(architecture, device, dtype)
    else:
        decoder = TransformersDecoder(model_path, device, dtype)
        if not is_torch_dist(model_path):
            return decoder
    try:
        replace_weights(decoder.parameters, hf_weights(model_path, architecture))
    except WeightMismatch as error:
        raise ValueError(f"model.path: {model_path}: {error}; config.json and the weights must agree") from None
    return decoder


class WeightMismatch(ValueError):
    """The weights of a stream are not those of the model."""


def replace_weights(parameters: dict[str, Tensor], stream: Iterable[tuple[str, Tensor]]) -> None:
    """Copies every tensor of the stream into the parameter of its name, in place, cast to its dtype.

    Raises WeightMismatch for the first unknown name or wrong shape, or for missing names, after the stream's end:
    iterating it runs collectives that other ranks wait in.
    """
    missing, problem = dict.fromkeys(parameters), ""
    for name, tensor in stream:
        missing.pop(name, None)
        if name not in parameters:
            problem = problem or f"unknown weight {name}"
        elif tensor.shape != parameters[name].shape:
            shapes = f"{tuple(tensor.shape)}, the model has {tuple(parameters[name].shape)}"
            problem = problem or f"weight {name} has shape {shapes}"
        elif not problem:
            with torch.no_grad():
                parameters[name].copy_(tensor)
    if missing and not problem:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        problem = f"missing weight {next(iter(missing))}{more}"
    if problem:
        raise WeightMismatch(problem)


@dataclass(slots=True, frozen=True)
class Responses:
    """Responses cut at their lengths' maximum; what lies beyond a row's length is undefined."""

    token_ids: Tensor  # [N, L] int64
    rollout_logprobs: Tensor  # [N, L] float32
    model_logprobs: Tensor  # [N, L] float32
    lengths: Tensor  # [N] int64


class LocalEngine:
    """A `RolloutEngine` in this process. It begins every response anew: `begun` is for servers.

    model_path: Hugging Face directory. batch_size: sequences decoded together. process_group: ranks that share the
    work; each calls every method with the same arguments. Results are a function of the inputs, `batch_size` and the
    number of ranks; the random numbers of a request are a function of its seed alone.
    """

    def __init__(
        self,
        model_path: Path,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.is_collective = True
        if batch_size < 1:
            raise ValueError(f"rollout.batch_size must be >= 1, got {batch_size}")
        self.device, self.batch_size, self.process_group = device, batch_size, process_group
        self.decoder: Decoder | None = load_decoder(model_path, device, dtype)
        self.version = 0
        self.is_paused = False
        self.has_told_of_memory = False
        self.has_whole_weights = True  # False after an update that failed half-way

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `replace_weights`. After an error the engine is unhealthy until an update succeeds."""
        self.has_whole_weights = False
        replace_weights(self._open_decoder().parameters, stream)
        self.has_whole_weights = True
        self.version = version

    def pause(self) -> None:
        self.is_paused = True

    def resume(self) -> None:
        self.is_paused = False

    def flush_metrics(self) -> dict[str, float]:
        return {}

    def health(self) -> bool:
        return self.decoder is not None and self.has_whole_weights

    def close(self) -> None:
        self.decoder = None

    def _open_decoder(self) -> Decoder:
        if self.decoder is None:
            raise RuntimeError("the local engine is closed")
        return self.decoder

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """See `RolloutEngine`. All end together here: `watch` is told of each, and nothing is given up.

        Raises ValueError for a prompt that is empty or not in the model's vocabulary, RuntimeError when the engine is
        closed, paused or half updated, and FloatingPointError when the model's logits are not finite.
        """
        decoder = self._open_decoder()
        if self.is_paused or not self.has_whole_weights:
            raise RuntimeError(
                f"the local engine is {'paused' if self.is_paused else 'half updated'}: it cannot generate"
            )
        check_prompts(requests, decoder.vocab_size)
        if not requests:
            return []
        rank, size = 0, 1
        if self.process_group is not None:
            rank, size = dist.get_rank(self.process_group), dist.get_world_size(self.process_group)
        shares = share_requests(requests, size)
        responses = self._decode([requests[index] for index in shares[rank]], params)
        if size == 1:
            every_response = [responses]
        else:
            assert self.process_group is not None
            every_response = gather_responses(responses, max(map(len, shares)), self.process_group)
        generations: dict[int, Generation] = {}
        for share, part in zip(shares, every_response, strict=True):
            generations |= zip(share, to_generations(part, params), strict=False)
        if watch is not None:
            for index in range(len(requests)):
                watch(index, generations[index])
        return [generations[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _decode(self, requests: list[GenerationRequest], params: SamplingParams) -> Responses:
        """This rank's share: `batch_size` requests at a time, or as many as the free memory of the GPU holds."""
        decoder, size = self._open_decoder(), self.batch_size
        if self.device.type == "cuda" and requests:
            longest = max(len(request.prompt_ids) for request in requests) + params.max_new_tokens
            size = self._rows_that_fit(decoder.bytes_of_row(longest), min(size, len(requests)), longest)
        waves = [
            decode_wave(decoder, requests[begin : begin + size], params, self.device)
            for begin in range(0, len(requests), size)
        ]
        return concatenate(waves, self.device)

    def _rows_that_fit(self, bytes_of_row: int, wanted: int, num_tokens: int) -> int:
        """Says once when the rows are fewer than wanted. Raises ValueError where not even one fits."""
        size = rows_within(free_bytes(self.device), bytes_of_row, wanted, num_tokens)
        if size < wanted and not self.has_told_of_memory:
            self.has_told_of_memory = True
            LOG.warning(
                "the local engine decodes %d sequences at a time instead of rollout.batch_size=%d: its keys and values "
                "of %d tokens would not fit the free memory of the GPU",
                size,
                self.batch_size,
                num_tokens,
            )
        return size


def free_bytes(device: torch.device) -> int:
    """Of a GPU: what the driver has, and what torch's allocator keeps without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def rows_within(num_bytes: int, bytes_of_row: int, wanted: int, num_tokens: int) -> int:
    """`wanted` rows, or as many as fit USABLE_SHARE of the bytes. Raises ValueError where not even one fits."""
    size = int(USABLE_SHARE * num_bytes) // bytes_of_row
    if size < 1:
        raise ValueError(
            f"rollout.max_new_tokens: one sequence of {num_tokens} tokens takes {bytes_of_row / 2**30:.1f} GiB of GPU "
            f"memory in the local engine, and {num_bytes / 2**30:.1f} GiB are free: lower it, or set "
            "rollout.engine=sglang"
        )
    return min(size, wanted)


def share_requests(requests: Sequence[GenerationRequest], size: int) -> list[list[int]]:
    """Indices of requests for each of `size` ranks: whole groups of one prompt, each to the rank with the fewest."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(tuple(request.prompt_ids), []).append(index)
    shares: list[list[int]] = [[] for _ in range(size)]
    for group in groups.values():
        min(shares, key=len).extend(group)
    return shares


def decode_wave(
    decoder: Decoder, requests: Sequence[GenerationRequest], params: SamplingParams, device: torch.device
) -> Responses:
    """Decodes all requests in lockstep, those with one prompt from one prefill; finished rows leave the batch."""
    prompts = {tuple(request.prompt_ids): None for request in requests}
    place = {prompt: number for number, prompt in enumerate(prompts)}
    prompt_of_row = torch.tensor([place[tuple(request.prompt_ids)] for request in requests], device=device)
    prompt_ids, num_padding = pad_left(list(prompts), device)
    rows = Rows.begin(requests, params, device)
    wave = Responses(
        token_ids=torch.zeros(params.max_new_tokens, len(requests), dtype=torch.int64, device=device),
        rollout_logprobs=torch.zeros(params.max_new_tokens, len(requests), dtype=torch.float32, device=device),
        model_logprobs=torch.zeros(params.max_new_tokens, len(requests), dtype=torch.float32, device=device),
        lengths=torch.full((len(requests),), params.max_new_tokens, device=device),
    )  # [L, N] until they are complete
    max_length = prompt_ids.shape[1] + params.max_new_tokens
    logits, decoding = decoder.start(prompt_ids, num_padding, prompt_of_row, max_length)
    look_every = TOKENS_BETWEEN_LOOKS[device.type]
    uniform = torch.empty(0, 0)
    for position in range(params.max_new_tokens):
        if position % look_every == 0:
            count = min(look_every, params.max_new_tokens - position)
            uniform = uniforms_of_positions(rows.seeds, position, count)
        draws = draw_with(logits, uniform[position % look_every], params)
        next_ids = draws.token_ids
        wave.token_ids[position].index_copy_(0, rows.numbers, next_ids)
        wave.rollout_logprobs[position].index_copy_(0, rows.numbers, draws.rollout_logprobs)
        wave.model_logprobs[position].index_copy_(0, rows.numbers, draws.model_logprobs)
        if params.stop_token_ids:
            rows.stop(next_ids, position)
            if (position + 1) % look_every == 0:
                kept = rows.live()
                if len(kept) == 0:
                    break
                if len(kept) <= DROP_BELOW * len(rows.numbers):
                    kept = kept.to(device, non_blocking=True)
                    wave.lengths.index_copy_(0, rows.numbers, rows.lengths)
                    rows, next_ids = rows.only(kept), next_ids.index_select(0, kept)
                    decoding.keep(kept)
        if position + 1 < params.max_new_tokens:
            logits = decoding.advance(next_ids)
    wave.lengths.index_copy_(0, rows.numbers, rows.lengths)
    return Responses(wave.token_ids.T, wave.rollout_logprobs.T, wave.model_logprobs.T, wave.lengths)


@dataclass(slots=True, frozen=True)
class Rows:
    """The rows that are decoded: B of the N of a wave. Rows that have stopped stay until the next look."""

    numbers: Tensor  # [B] int64, rising indices into [N]
    seeds: Tensor  # [B] int64
    lengths: Tensor  # [B] int64: of the response, with its stop token; the longest allowed until there is one
    is_live: Tensor  # [B] bool
    stop_ids: Tensor  # int64

    @staticmethod
    def begin(requests: Sequence[GenerationRequest], params: SamplingParams, device: torch.device) -> Rows:
        return Rows(
            numbers=torch.arange(len(requests), device=device),
            seeds=seed_tensor([request.seed for request in requests], device),
            lengths=torch.full((len(requests),), params.max_new_tokens, device=device),
            is_live=torch.ones(len(requests), dtype=torch.bool, device=device),
            stop_ids=torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device),
        )

    def stop(self, token_ids: Tensor, position: int) -> None:
        """Notes which rows end with the token at `position`; does not wait for the device."""
        has_stopped = (token_ids[:, None] == self.stop_ids).any(dim=1).logical_and_(self.is_live)
        self.lengths.masked_fill_(has_stopped, position + 1)
        self.is_live.logical_and_(~has_stopped)

    def live(self) -> Tensor:
        """Indices into [B] of the rows that go on, on the host: waits for the device."""
        return self.is_live.cpu().nonzero()[:, 0]

    def only(self, kept: Tensor) -> Rows:
        """kept: rising indices into [B]."""
        return Rows(
            numbers=self.numbers.index_select(0, kept),
            seeds=self.seeds.index_select(0, kept),
            lengths=self.lengths.index_select(0, kept),
            is_live=self.is_live.index_select(0, kept),
            stop_ids=self.stop_ids,
        )


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [U, P] with zeros before the shorter prompts, and their number [U]."""
    length = max(map(len, prompts))
    padded = [[0] * (length - len(prompt)) + list(prompt) for prompt in prompts]
    num_padding = [length - len(prompt) for prompt in prompts]
    return torch.tensor(padded, device=device), torch.tensor(num_padding, device=device)


def concatenate(waves: Sequence[Responses], device: torch.device) -> Responses:
    """One after the other, cut at the longest response; empty without waves."""
    if not waves:
        nothing = torch.zeros(0, 0, device=device)
        return Responses(nothing.long(), nothing, nothing, torch.zeros(0, dtype=torch.int64, device=device))
    length = max(int(wave.lengths.max()) for wave in waves)
    return Responses(
        torch.cat([wave.token_ids[:, :length] for wave in waves]),
        torch.cat([wave.rollout_logprobs[:, :length] for wave in waves]),
        torch.cat([wave.model_logprobs[:, :length] for wave in waves]),
        torch.cat([wave.lengths for wave in waves]),
    )


def gather_responses(responses: Responses, num_rows: int, group: dist.ProcessGroup) -> list[Responses]:
    """Every rank's responses, padded to `num_rows` rows, the largest share. Collective."""
    device = responses.lengths.device
    longest = torch.tensor(responses.token_ids.shape[1], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    length = int(longest)
    own_rows, own_length = responses.token_ids.shape
    # Float32 log-probs travel as their bits beside int32 token ids, in one collective.
    packed = torch.zeros(num_rows, 1 + 3 * length, dtype=torch.int32, device=device)
    packed[:own_rows, 0] = responses.lengths
    fields = packed[:, 1:].view(num_rows, 3, length)[:own_rows, :, :own_length]
    fields[:, 0] = responses.token_ids
    fields[:, 1] = responses.rollout_logprobs.contiguous().view(torch.int32)
    fields[:, 2] = responses.model_logprobs.contiguous().view(torch.int32)
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, packed, group=group)
    return [unpack(part) for part in gathered]


def unpack(packed: Tensor) -> Responses:
    """[N, 1 + 3 L] int32, as `gather_responses` packs it."""
    token_ids, *logprobs = (part.contiguous() for part in packed[:, 1:].chunk(3, dim=1))
    return Responses(
        token_ids.long(), logprobs[0].view(torch.float32), logprobs[1].view(torch.float32), packed[:, 0].long()
    )


def to_generations(responses: Responses, params: SamplingParams) -> list[Generation]:
    """Raises FloatingPointError when a log-prob is not finite: the model is broken, its samples are noise."""
    generations = []
    columns = (responses.token_ids, responses.rollout_logprobs, responses.model_logprobs, responses.lengths)
    for token_ids, rollout, model, length in zip(*(column.tolist() for column in columns), strict=True):
        if not all(map(isfinite, model[:length])):
            raise FloatingPointError("the model's logits are not finite: the weights are broken")
        stopped = length > 0 and token_ids[length - 1] in params.stop_token_ids
        generations.append(
            Generation(token_ids[:length], rollout[:length], model[:length], "stop" if stopped else "length")
        )
    return generations
