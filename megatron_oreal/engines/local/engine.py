"""The embedded engine: decodes in the trainer's own processes; no server, no port.

Every rank of the process group holds the whole model and decodes its share of the prompts; all ranks get all results.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams, Watch, check_prompts
from megatron_oreal.engines.local.decoder import LlamaDecoder
from megatron_oreal.engines.local.token_sampling import draw, seed_tensor
from megatron_oreal.engines.local.transformers_decoder import TransformersDecoder
from megatron_oreal.weights.families import FAMILIES, read_architecture
from megatron_oreal.weights.initial import hf_weights
from megatron_oreal.weights.torch_dist_reader import is_torch_dist

if TYPE_CHECKING:
    pass

# Finished rows are dropped when the live ones are at most this share of the batch: copying the cache is cheap.
DROP_BELOW = 0.9


class Decoding(Protocol):
    def advance(self, token_ids: Tensor) -> Tensor:
        """Appends token_ids [B]; the logits [B, V] of the next ones."""

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but `rows`, indices into [B]."""


class Decoder(Protocol):
    vocab_size: int
    parameters: dict[str, Tensor]  # writable, by Hugging Face name

    def start(self, prompt_ids: Tensor, num_padding: Tensor, prompt_of_row: Tensor) -> tuple[Tensor, Decoding]:
        """Prompts [U, P] padded on the left by num_padding [U], prompt_of_row [B] -> first logits [B, V], decoding."""


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
    if FAMILIES[architecture.family].decoder == "llama":
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
        """This rank's share, `batch_size` requests at a time."""
        waves = [
            decode_wave(self._open_decoder(), requests[begin : begin + self.batch_size], params, self.device)
            for begin in range(0, len(requests), self.batch_size)
        ]
        return concatenate(waves, self.device)


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
    seeds = seed_tensor([request.seed for request in requests], device)
    stop_ids = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=device)

    num_rows, max_length = len(requests), params.max_new_tokens
    token_ids = torch.zeros(max_length, num_rows, dtype=torch.int64, device=device)
    logprobs = torch.zeros(2, max_length, num_rows, dtype=torch.float32, device=device)
    lengths = torch.full((num_rows,), max_length, device=device)
    rows = torch.arange(num_rows, device=device)  # [B], the batch's rows among all
    is_live = torch.ones(num_rows, dtype=torch.bool, device=device)  # [B]
    logits, decoding = decoder.start(prompt_ids, num_padding, prompt_of_row)
    for position in range(max_length):
        draws = draw(logits, seeds, position, params)
        token_ids[position, rows] = draws.token_ids
        logprobs[0, position, rows], logprobs[1, position, rows] = draws.rollout_logprobs, draws.model_logprobs
        next_ids = draws.token_ids
        if params.stop_token_ids:
            has_stopped = is_live & torch.isin(next_ids, stop_ids)
            lengths[rows[has_stopped]] = position + 1
            is_live &= ~has_stopped
            num_live = int(is_live.sum())
            if num_live == 0:
                break
            if num_live <= DROP_BELOW * len(rows):
                kept = is_live.nonzero()[:, 0]
                rows, seeds, next_ids, is_live = rows[kept], seeds[kept], next_ids[kept], is_live[kept]
                decoding.keep(kept)
        if position + 1 < max_length:
            logits = decoding.advance(next_ids)
    return Responses(token_ids.T, logprobs[0].T, logprobs[1].T, lengths)


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
