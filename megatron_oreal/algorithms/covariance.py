"""Finds the few tokens that reduce the policy's entropy most: those whose log-prob and advantage covary most.

The source is Cui et al. 2025, "The entropy mechanism of reinforcement learning for reasoning language models",
arXiv:2505.22617. Clip-Cov removes from the loss a random choice of the tokens whose covariance lies between two bounds;
KL-Cov adds |log ratio| to the loss of the tokens with the highest covariance. The published code chooses within one
micro-batch, with the current log-probs. Here means and choices extend over all tokens of the step, on all ranks, so
that the layout changes nothing, and the log-probs are those from before the step's first update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_oreal.algorithms.corrections import Segments
from megatron_oreal.config import OutcomeConfig
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.types import Batch, Metrics, Microbatch

SumOverData = Callable[[Tensor], Tensor]  # The sum over the data-parallel ranks.
STEP, MIX_1, MIX_2 = (value - 2**64 for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hold_back(batch: Batch, config: OutcomeConfig, plan: PackingPlan, seed: int, sum_over_data: SumOverData) -> Metrics:
    """Leaves the chosen tokens out of the coefficients (Clip-Cov), or fills their `penalties` (KL-Cov).

    The micro-batches must hold old_logprobs, coefficients and shares. `seed` determines the random choice; the caller
    passes another one in each step.
    """
    products, mean = covariances(batch, sum_over_data)
    scores = products
    if config.covariance == "clip":
        low, high = config.covariance_low, config.covariance_high
        scores = [
            torch.where((product > low) & (product < high), random_keys(part, seed), -torch.inf)
            for part, product in zip(batch.microbatches, products, strict=True)
        ]
    count = max(1, int(config.covariance_share * batch.num_tokens))
    threshold = kth_highest(torch.cat(scores), count, plan, sum_over_data)
    num_chosen = products[0].new_zeros(1)
    for microbatch, score in zip(batch.microbatches, scores, strict=True):
        chosen = (score >= threshold) & (score > -torch.inf)
        num_chosen += chosen.sum()
        spread = torch.zeros_like(microbatch.loss_mask).index_copy_(0, microbatch.trained, chosen)
        apply_choice(microbatch, spread, config)
    share = float(sum_over_data(num_chosen)) / batch.num_tokens
    return {"train/covariance_mean": mean, "train/covariance_chosen_share": share}


def apply_choice(microbatch: Microbatch, chosen: Tensor, config: OutcomeConfig) -> None:
    assert microbatch.coefficients is not None and microbatch.shares is not None
    if config.covariance == "clip":
        microbatch.coefficients = torch.where(chosen, 0.0, microbatch.coefficients)
        microbatch.shares = torch.where(chosen, 0.0, microbatch.shares)
    else:
        microbatch.penalties = torch.where(chosen, config.covariance_coef * microbatch.shares, 0.0)


def covariances(batch: Batch, sum_over_data: SumOverData) -> tuple[list[Tensor], float]:
    """Returns (log-prob - mean) x (advantage - mean) of the trained tokens of each micro-batch, and its mean."""
    pairs = []
    for part in batch.microbatches:
        assert part.old_logprobs is not None
        pairs.append([values.index_select(0, part.trained).double() for values in (part.old_logprobs, part.advantages)])
    totals = torch.stack([torch.cat(values).sum() for values in zip(*pairs, strict=True)])
    means = sum_over_data(totals) / batch.num_tokens
    products = [(logprobs - means[0]) * (advantages - means[1]) for logprobs, advantages in pairs]
    return products, float(sum_over_data(torch.cat(products).sum()[None])) / batch.num_tokens


def kth_highest(values: Tensor, count: int, plan: PackingPlan, sum_over_data: SumOverData) -> Tensor:
    """Returns the count-th highest value of all ranks, or the lowest one if there are fewer values."""
    table = values.new_zeros(plan.data_size, count)
    own = values.topk(min(count, len(values))).values
    table[plan.data_rank] = -torch.inf
    table[plan.data_rank, : len(own)] = own
    return sum_over_data(table).flatten().topk(count).values[-1]


def random_keys(microbatch: Microbatch, seed: int) -> Tensor:
    """Returns a number in [0, 1) for each trained token, [T'], from the seed, its sequence and its place in it.

    The keys do not depend on how sequences are packed. Equal sequences have equal keys.
    """
    tokens = mix(microbatch.input_ids + STEP * microbatch.position_ids)
    sequences = Segments(microbatch.sequence_ids, microbatch.num_sequences).total(tokens)
    own = sequences.index_select(0, microbatch.trained)
    return (mix(mix(own + seed) + STEP * microbatch.trained_places) & (2**53 - 1)).double() * 2.0**-53


def mix(bits: Tensor) -> Tensor:
    """Scrambles int64 numbers: the output function of splitmix64 (Steele, Lea and Flood, 2014)."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def seed_of_step(seed: int, step: int) -> int:
    """Returns an int64 seed for the choices of one step."""
    return int(mix(torch.tensor([(seed * 1_000_003 + step + 2**63) % 2**64 - 2**63]))[0])
