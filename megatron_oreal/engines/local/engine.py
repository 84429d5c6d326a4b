"""Generates in the trainer's own processes, without a server or a port.

Every rank of the process group holds the whole model and decodes its share of the prompts; the first rank gets all
responses.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain
from math import ceil
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.engines.engine import (
    BatchIndex,
    Generation,
    GenerationRequest,
    SamplingParams,
    Watch,
    check_prompts,
)
from megatron_oreal.engines.local.decoder import LlamaDecoder
from megatron_oreal.engines.local.transformers_decoder import TransformersDecoder
from megatron_oreal.engines.local.waves import NO_RESPONSES, Decoder, Responses, decode_wave, to_generations
from megatron_oreal.engines.main_thread import MainThreadCalls
from megatron_oreal.engines.stop_strings import Decode
from megatron_oreal.types import no_ids, no_logprobs
from megatron_oreal.weights.families import FAMILIES, read_architecture
from megatron_oreal.weights.initial import check_finite, check_trunk, hf_weights
from megatron_oreal.weights.torch_dist_reader import is_torch_dist

LOG = logging.getLogger(__name__)
USABLE_SHARE = 0.9  # of a GPU's free memory, for the rows that are decoded together


def load_decoder(model_path: Path, device: torch.device, dtype: torch.dtype) -> Decoder:
    """Loads our own decoder for the families that it supports, and transformers' model for the others.

    model_path: a Hugging Face directory, or a torch_dist one with config.json. Raises ValueError naming model.path when
    weights are missing or have the wrong shape.
    """
    try:
        architecture = read_architecture(model_path)
    except ValueError:
        if is_torch_dist(model_path):
            raise
        return TransformersDecoder(model_path, device, dtype)  # only transformers supports this family or setting
    check_trunk(model_path, architecture)
    decoder: Decoder
    if FAMILIES[architecture.family].decoder == "llama":
        decoder = LlamaDecoder(architecture, device, dtype)
    else:
        decoder = TransformersDecoder(model_path, device, dtype)
        if not is_torch_dist(model_path):
            for name, parameter in decoder.parameters.items():
                check_finite(name, parameter, model_path)
            return decoder
    try:
        replace_weights(decoder.parameters, hf_weights(model_path, architecture))
    except WeightMismatch as error:
        raise ValueError(f"model.path: {model_path}: {error}; config.json and the weights must agree") from None
    return decoder


class WeightMismatch(ValueError):
    """Raised if the weights of a stream do not belong to the model."""


def replace_weights(parameters: dict[str, Tensor], stream: Iterable[tuple[str, Tensor]]) -> None:
    """Copies every tensor of the stream into the parameter of its name, in place, cast to its dtype.

    Raises WeightMismatch for the first unknown name or wrong shape, or for missing names. It does so after the stream's
    end, because the iteration runs collectives that other ranks wait in.
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


GIVEN_UP = Generation(no_ids(), no_logprobs(), no_logprobs(), "abort")
Work = tuple[list[list[GenerationRequest]], SamplingParams]  # one wave: a list of requests for each rank


class LocalEngine:
    """A `RolloutEngine` in the trainer's own processes.

    model_path: Hugging Face directory. batch_size: the sequences that one rank decodes together. process_group: the
    ranks that share the work. decode: without it, responses continue after a stop string. The first rank's `generate`
    divides the requests into waves; every rank decodes its share of a wave, and the first rank receives the whole wave.
    Results depend only on the inputs, `batch_size` and the number of ranks; the random numbers of a request depend only
    on its seed. The engine finishes every response, so it accepts no request with a `begun` response.
    """

    def __init__(
        self,
        model_path: Path,
        device: torch.device,
        dtype: torch.dtype,
        batch_size: int,
        process_group: dist.ProcessGroup | None = None,
        decode: Decode | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"rollout.batch_size must be >= 1, got {batch_size}")
        self.device, self.batch_size, self.process_group = device, batch_size, process_group
        self.decode = decode
        self.rank, self.num_ranks = 0, 1
        if process_group is not None:
            self.rank, self.num_ranks = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.calls = MainThreadCalls()
        self.decoder: Decoder | None = load_decoder(model_path, device, dtype)
        self.version = 0
        self.has_told_of_memory = False
        self.has_whole_weights = True  # False after an update that failed halfway

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Implements `replace_weights`. After an error the engine does not generate until an update succeeds."""
        decoder, self.has_whole_weights = self._open_decoder(), False
        replace_weights(decoder.parameters, stream)
        self.has_whole_weights = True
        self.version = version

    def flush_metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.decoder = None

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """Implements `RolloutEngine`. `watch` receives a wave's responses together, and may abandon the later waves.

        Raises ValueError for a prompt that is empty or not in the model's vocabulary, RuntimeError when the engine is
        closed or half updated or another rank fails, and FloatingPointError when the model's logits are not finite.
        """
        check_prompts(requests, self._updated_decoder().vocab_size, params)
        generations = [GIVEN_UP] * len(requests)
        for wave in split_into_waves(requests, self.num_ranks, self._rows_of_a_wave(requests, params)):
            shares = [[requests[index] for index in indices] for indices in wave]
            responses = self.calls.run(partial(self._lead, shares, params))
            for indices, part in zip(wave, responses, strict=True):
                for index, generation in zip(indices, to_generations(part, params, self.decode), strict=False):
                    generations[index] = generation
            if watch is not None and tell(watch, sorted(chain(*wave)), generations):
                break
        return generations

    def take_part(self) -> None:
        """Implements `RolloutEngine`: the first rank runs the waiting call, and the others decode their shares."""
        if self.rank == 0:
            self.calls.run_next()
        else:
            self._decode_together(*self._broadcast(None))

    def _lead(self, shares: list[list[GenerationRequest]], params: SamplingParams) -> list[Responses]:
        """Decodes one wave on all ranks; returns each rank's responses. Only the first rank's main thread calls it."""
        return self._decode_together(*self._broadcast((shares, params)))

    def _broadcast(self, work: Work | None) -> Work:
        """Collective. Broadcasts the first rank's work to all ranks."""
        works = [work]
        if self.process_group is not None:
            dist.broadcast_object_list(works, dist.get_global_rank(self.process_group, 0), self.process_group)
        assert works[0] is not None
        return works[0]

    def _decode_together(self, shares: list[list[GenerationRequest]], params: SamplingParams) -> list[Responses]:
        """Collective. Decodes this rank's share; returns all shares on the first rank, and nothing on the others."""
        responses, failure = NO_RESPONSES, None
        try:
            if shares[self.rank]:
                responses = decode_wave(self._updated_decoder(), shares[self.rank], params, self.device, self.decode)
        except Exception as error:
            if self.process_group is None:
                raise
            failure = error  # the other ranks wait in a collective, so the error is raised after it
        if self.process_group is None:
            return [responses]
        return gather_responses(responses, failure, max(map(len, shares)), self.device, self.process_group)

    def _open_decoder(self) -> Decoder:
        if self.decoder is None:
            raise RuntimeError("the local engine is closed")
        return self.decoder

    def _updated_decoder(self) -> Decoder:
        if not self.has_whole_weights:
            raise RuntimeError("the local engine is half updated: it cannot generate")
        return self._open_decoder()

    def _rows_of_a_wave(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> int:
        """Returns how many rows a rank decodes together: `batch_size`, or fewer if a GPU's free memory requires it."""
        if self.device.type != "cuda" or not requests:
            return self.batch_size
        longest = max(params.longest_sequence(len(request.prompt_ids)) for request in requests)
        wanted = min(self.batch_size, ceil(len(requests) / self.num_ranks))
        return self._rows_that_fit(self._open_decoder().bytes_of_row(longest), wanted, longest)

    def _rows_that_fit(self, bytes_of_row: int, wanted: int, num_tokens: int) -> int:
        """Logs once if fewer rows fit than wanted. Raises ValueError if not even one row fits."""
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
    """Returns the free memory of a GPU: the driver's, and the unused part of torch's cache."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def rows_within(num_bytes: int, bytes_of_row: int, wanted: int, num_tokens: int) -> int:
    """Returns `wanted`, or the number of rows that fit USABLE_SHARE of the bytes. Raises ValueError if none fits."""
    size = int(USABLE_SHARE * num_bytes) // bytes_of_row
    if size < 1:
        raise ValueError(
            f"rollout.max_new_tokens: one sequence of {num_tokens} tokens takes {bytes_of_row / 2**30:.1f} GiB of GPU "
            f"memory in the local engine, and {num_bytes / 2**30:.1f} GiB are free: lower it, or set "
            "rollout.engine=sglang"
        )
    return min(size, wanted)


def split_into_waves(requests: Sequence[GenerationRequest], num_ranks: int, batch_size: int) -> list[list[list[int]]]:
    """Divides the requests into waves of at most `batch_size` request indices for each rank.

    The requests of one prompt stay together if they fit, and go to the rank with the fewest requests. A wave depends
    only on the requests that the previous waves left. A resumed run that finds the responses of whole waves in the
    ledger therefore decodes the others in the same batches as before, and gets the same last digits.
    """
    groups: dict[bytes, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.prompt_ids.tobytes(), []).append(index)
    waves: list[list[list[int]]] = []
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    for group in groups.values():
        rest = group
        while rest:
            smallest = min(shares, key=len)
            room = batch_size - len(smallest)
            smallest += rest[:room]
            rest = rest[room:]
            if all(len(share) == batch_size for share in shares):
                waves.append(shares)
                shares = [[] for _ in range(num_ranks)]
    return [*waves, shares] if any(shares) else waves


def tell(watch: Watch, indices: Sequence[int], generations: Sequence[Generation]) -> bool:
    """Passes one wave's responses to the watch; returns whether the engine may abandon the other waves."""
    size = len(indices)
    told = [watch(index, generations[index], BatchIndex(position, size)) for position, index in enumerate(indices)]
    return any(told)


def gather_responses(
    responses: Responses, failure: Exception | None, num_rows: int, device: torch.device, group: dist.ProcessGroup
) -> list[Responses]:
    """Collective. Returns every rank's responses on the first rank, and nothing on the others.

    num_rows: of the largest share. If a rank has a `failure` instead of responses, the first rank raises its own
    failure, or a RuntimeError that names the other rank and its error.
    """
    own_rows, own_length = responses.token_ids.shape
    largest = torch.tensor([own_length, failure is not None], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    length, has_failed = largest.tolist()
    is_first = dist.get_rank(group) == 0
    if has_failed:
        raise_on_first_rank(failure, group)
        return []
    # The bits of float32 log-probs travel beside int32 token ids, in one collective.
    packed = torch.zeros(num_rows, 1 + 3 * length, dtype=torch.int32, device=device)
    packed[:own_rows, 0] = responses.lengths
    fields = packed[:, 1:].view(num_rows, 3, length)[:own_rows, :, :own_length]
    fields[:, 0] = responses.token_ids
    fields[:, 1] = responses.rollout_logprobs.contiguous().view(torch.int32)
    fields[:, 2] = responses.model_logprobs.contiguous().view(torch.int32)
    gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))] if is_first else None
    dist.gather(packed, gathered, dist.get_global_rank(group, 0), group)
    return [unpack(part) for part in gathered] if gathered is not None else []


def raise_on_first_rank(failure: Exception | None, group: dist.ProcessGroup) -> None:
    """Collective. Raises a rank's failure on the first rank; the others return."""
    descriptions: list[str | None] = [None] * dist.get_world_size(group)
    description = f"{type(failure).__name__}: {failure}" if failure is not None else None
    dist.all_gather_object(descriptions, description, group)
    if dist.get_rank(group) > 0:
        return
    if failure is not None:
        raise failure
    rank, words = next((rank, words) for rank, words in enumerate(descriptions) if words is not None)
    raise RuntimeError(f"rank {rank} could not generate: {words}")


def unpack(packed: Tensor) -> Responses:
    """Unpacks [N, 1 + 3 L] int32, as `gather_responses` packs it."""
    token_ids, *logprobs = (part.contiguous() for part in packed[:, 1:].chunk(3, dim=1))
    return Responses(
        token_ids.long(), logprobs[0].view(torch.float32), logprobs[1].view(torch.float32), packed[:, 0].long()
    )
