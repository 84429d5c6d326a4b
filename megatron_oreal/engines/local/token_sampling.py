"""Sampling one token a row from counter-based random numbers.

The uniform of a token depends on its row's seed and its position in the response only, so a response does not depend on
what else is in the batch, on the process that decodes it or on the device. The generator is splitmix64 (Steele, Lea and
Flood, 2014, "Fast splittable pseudorandom number generators"), read at `position` instead of being stepped.

The functions here are the definition, and what runs on a CPU. On a GPU with Triton, kernels/triton_sampling.py
computes the same without sorting the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.engines.engine import SamplingParams


def as_int64(value: int) -> int:
    """The integer modulo 2^64, as the signed number with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN_GAMMA = as_int64(0x9E3779B97F4A7C15)
MIX_1 = as_int64(0xBF58476D1CE4E5B9)
MIX_2 = as_int64(0x94D049BB133111EB)
# Probabilities are cumulated as integers: their sums are exact, and so the same in any order of addition.
PROBABILITY_ONE = 2.0**50


@dataclass(slots=True, frozen=True)
class Draws:
    token_ids: Tensor  # [N] int64
    rollout_logprobs: Tensor  # [N] float32, of the tempered, truncated distribution; 0 when greedy: a point mass
    model_logprobs: Tensor  # [N] float32, of softmax(logits)


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Seeds of any size as int64 [N]; equal modulo 2^64 is equal."""
    return torch.tensor([as_int64(seed) for seed in seeds], dtype=torch.int64, device=device)


def uniforms(seeds: Tensor, position: int) -> Tensor:
    """Float64 in [0, 1) of (seed, position), bit-identical on every device.

    seeds: [N] int64. position: index in the response, from 0.
    """
    return uniforms_of_positions(seeds, position, 1)[0]


def uniforms_of_positions(seeds: Tensor, first: int, count: int) -> Tensor:
    """[count, N]: those of `count` positions from `first` on."""
    steps = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=seeds.device) * GOLDEN_GAMMA
    # The seed is mixed by itself first: the streams of seeds a gamma apart would else be shifts of each other.
    bits = splitmix64(splitmix64(seeds) + steps[:, None])
    return logical_shift_right(bits, 11).to(torch.float64) * 2.0**-53


def splitmix64(state: Tensor) -> Tensor:
    """The output function of splitmix64 on int64 tensors, whose products wrap around as unsigned ones do."""
    state = (state ^ logical_shift_right(state, 30)) * MIX_1
    state = (state ^ logical_shift_right(state, 27)) * MIX_2
    return state ^ logical_shift_right(state, 31)


def logical_shift_right(bits: Tensor, count: int) -> Tensor:
    # The shift of a signed tensor copies the sign bit.
    return (bits >> count) & ((1 << (64 - count)) - 1)


def draw(logits: Tensor, seeds: Tensor, position: int, params: SamplingParams) -> Draws:
    """`draw_with` the random numbers of the token at `position` of every row's response. seeds: [N] int64."""
    return draw_with(logits, uniforms(seeds, position), params)


def draw_with(logits: Tensor, uniform: Tensor, params: SamplingParams) -> Draws:
    """Samples one token a row.

    logits: [N, V], any float dtype; computed in float32. uniform: [N] float64 in [0, 1). Rows whose logits are not
    finite get a token of the vocabulary and a log-prob that is not finite.
    """
    if params.temperature == 0:
        return draw_greedily(logits.float())
    sample_rows = gpu_sampler() if logits.is_cuda and logits.shape[1] <= MAX_GPU_VOCABULARY else None
    if sample_rows is not None:
        return Draws(*sample_rows(logits, uniform, params.temperature, params.top_k, params.top_p))
    logits = logits.float()
    model_logprobs = torch.log_softmax(logits, dim=-1)
    rollout_logprobs = model_logprobs
    if params.temperature != 1 or params.top_k or params.top_p < 1:
        tempered = logits / params.temperature
        rollout_logprobs = torch.log_softmax(truncate(tempered, params.top_k, params.top_p), dim=-1)
    token_ids = invert_cdf(rollout_logprobs.exp(), uniform)
    return Draws(token_ids, gather_tokens(rollout_logprobs, token_ids), gather_tokens(model_logprobs, token_ids))


def draw_greedily(logits: Tensor) -> Draws:
    token_ids = logits.argmax(dim=-1)
    chosen = gather_tokens(torch.log_softmax(logits, dim=-1), token_ids)
    return Draws(token_ids, torch.zeros_like(chosen), chosen)


MAX_GPU_VOCABULARY = 2**18  # beyond it, the integer sums of triton_sampling.py might not fit their 63 bits


@functools.cache
def gpu_sampler() -> Callable[[Tensor, Tensor, float, int, float], tuple[Tensor, Tensor, Tensor]] | None:
    """None where Triton is not installed."""
    try:
        from megatron_oreal.kernels.triton_sampling import sample_rows
    except ImportError:
        return None
    return sample_rows


def gather_tokens(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """[N, V] at [N] -> [N]"""
    return logprobs.gather(-1, token_ids[:, None])[:, 0]


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [N, V] with -inf outside the `top_k` largest and, of these, outside the fewest with mass >= `top_p`.

    Equal logits count in the order of their ids. top_k 0 and top_p 1 keep everything.
    """
    vocab_size = logits.shape[-1]
    if not 0 < top_k < vocab_size and top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < vocab_size:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1:
        cdf = integer_cdf(torch.softmax(ordered, dim=-1))
        # A token stays when those before it fall short of the mass; the first one always does.
        short = cdf < top_p * cdf[:, -1:].double()
        ordered[:, 1:].masked_fill_(~short[:, :-1], -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def integer_cdf(probabilities: Tensor) -> Tensor:
    """Cumulated probabilities [N, V] in units of 2^-50, int64; smaller ones count as zero."""
    return (probabilities * PROBABILITY_ONE).to(torch.int64).cumsum(dim=-1)


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token [N] where the cumulated probabilities [N, V] pass `uniform` [N]; never one of probability zero."""
    cdf = integer_cdf(probabilities)
    total = cdf[:, -1]
    # The product may round up to the total itself.
    target = torch.minimum((uniform * total).to(torch.int64), total - 1)
    token_ids = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return token_ids.clamp_(max=probabilities.shape[-1] - 1)  # only ever needed for NaN
