"""Samples one token per row from counter-based random numbers.

The uniform number of a token depends only on its row's seed and its position in the response, so a response does not
depend on the other rows of the batch, on the process that decodes it or on the device. The generator is splitmix64
(Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"), evaluated at `position` instead of
being stepped.

These functions are the definition and run on a CPU. On a GPU with Triton, kernels/triton_sampling.py computes the same
results without sorting the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.engines.engine import SamplingParams


def as_int64(value: int) -> int:
    """Returns the integer modulo 2^64, as the signed number with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


GOLDEN_GAMMA = as_int64(0x9E3779B97F4A7C15)
MIX_1 = as_int64(0xBF58476D1CE4E5B9)
MIX_2 = as_int64(0x94D049BB133111EB)
# Probabilities are accumulated as integers, because integer sums are exact and thus independent of the order.
PROBABILITY_ONE = 2.0**50


@dataclass(slots=True, frozen=True)
class Draws:
    token_ids: Tensor  # [N] int64
    # [N] float32, of the tempered, truncated distribution; 0 for greedy decoding, which is a point mass
    rollout_logprobs: Tensor
    model_logprobs: Tensor  # [N] float32, of softmax(logits)


def seed_tensor(seeds: Sequence[int], device: torch.device) -> Tensor:
    """Converts seeds of any size to int64 [N], modulo 2^64."""
    return torch.tensor([as_int64(seed) for seed in seeds], dtype=torch.int64, device=device)


def uniforms(seeds: Tensor, position: int) -> Tensor:
    """Returns float64 numbers in [0, 1) for (seed, position), bit-identical on every device.

    seeds: [N] int64. position: index in the response, from 0.
    """
    return uniforms_of_positions(seeds, position, 1)[0]


def uniforms_of_positions(seeds: Tensor, first: int, count: int) -> Tensor:
    """Returns [count, N] uniforms for `count` positions from `first` on."""
    steps = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=seeds.device) * GOLDEN_GAMMA
    # The seed is mixed first. Otherwise the streams of two seeds that differ by gamma would be shifted copies.
    bits = splitmix64(splitmix64(seeds) + steps[:, None])
    return logical_shift_right(bits, 11).to(torch.float64) * 2.0**-53


def splitmix64(state: Tensor) -> Tensor:
    """Computes the output function of splitmix64 on int64 tensors, whose products wrap around like unsigned ones."""
    state = (state ^ logical_shift_right(state, 30)) * MIX_1
    state = (state ^ logical_shift_right(state, 27)) * MIX_2
    return state ^ logical_shift_right(state, 31)


def logical_shift_right(bits: Tensor, count: int) -> Tensor:
    # The shift of a signed tensor copies the sign bit, so the mask clears it.
    return (bits >> count) & ((1 << (64 - count)) - 1)


def draw(logits: Tensor, seeds: Tensor, position: int, params: SamplingParams) -> Draws:
    """Calls `draw_with` with the random numbers of `position` in every row's response. seeds: [N] int64."""
    return draw_with(logits, uniforms(seeds, position), params)


def draw_with(logits: Tensor, uniform: Tensor, params: SamplingParams) -> Draws:
    """Samples one token per row.

    logits: [N, V], any float dtype; computed in float32. uniform: [N] float64 in [0, 1). Rows with non-finite logits
    get a token of the vocabulary and a non-finite log-prob.
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


MAX_GPU_VOCABULARY = 2**18  # the integer sums of triton_sampling.py might exceed 63 bits for larger ones


@functools.cache
def gpu_sampler() -> Callable[[Tensor, Tensor, float, int, float], tuple[Tensor, Tensor, Tensor]] | None:
    """Returns the sampler for GPUs, or None if Triton is not installed."""
    try:
        from megatron_oreal.kernels.triton_sampling import sample_rows
    except ImportError:
        return None
    return sample_rows


def gather_tokens(logprobs: Tensor, token_ids: Tensor) -> Tensor:
    """Selects the log-probs of tokens: [N, V] at [N] -> [N]."""
    return logprobs.gather(-1, token_ids[:, None])[:, 0]


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Sets logits [N, V] to -inf outside the `top_k` largest and, of these, outside the fewest with mass >= `top_p`.

    Equal logits are ordered by token id. top_k 0 and top_p 1 keep everything.
    """
    vocab_size = logits.shape[-1]
    if not 0 < top_k < vocab_size and top_p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < vocab_size:
        ordered[:, top_k:] = -torch.inf
    if top_p < 1:
        cdf = integer_cdf(torch.softmax(ordered, dim=-1))
        # A token is kept if the mass of the tokens before it is below top_p; the first token is always kept.
        short = cdf < top_p * cdf[:, -1:].double()
        ordered[:, 1:].masked_fill_(~short[:, :-1], -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def integer_cdf(probabilities: Tensor) -> Tensor:
    """Returns cumulative probabilities [N, V] in units of 2^-50, int64; smaller probabilities count as zero."""
    return (probabilities * PROBABILITY_ONE).to(torch.int64).cumsum(dim=-1)


def invert_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Returns tokens [N] where the cumulative probabilities [N, V] exceed `uniform` [N]; none has probability zero."""
    cdf = integer_cdf(probabilities)
    total = cdf[:, -1]
    # The product may be rounded up to the total itself.
    target = torch.minimum((uniform * total).to(torch.int64), total - 1)
    token_ids = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return token_ids.clamp_(max=probabilities.shape[-1] - 1)  # only NaN needs the clamp
