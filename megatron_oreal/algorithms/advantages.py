"""Turns rewards into advantages of the same dtype; `whiten` and `overlong_penalty` modify them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_oreal.types import Batch, Metrics


def leave_one_out(rewards: Tensor) -> Tensor:
    """Returns A_i = r_i - mean of the group's other rewards (RLOO, Ahmadian et al. 2024; OREAL eq. 8).

    rewards [G, M] -> [G, M]. Raises ValueError for M < 2.
    """
    check_group(rewards)
    others = rewards.sum(dim=-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


def grpo(rewards: Tensor) -> Tensor:
    """Returns A_i = (r_i - mean) / (std + 1e-8), with Bessel's correction (Shao et al. 2024, eq. 3).

    rewards [G, M] -> [G, M]. Raises ValueError for M < 2.
    """
    check_group(rewards)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / (rewards.std(dim=-1, keepdim=True) + 1e-8)


def normalised(rewards: Tensor, std: str = "population", epsilon: float = 0.0) -> Tensor:
    """Returns the advantages of GRPO and its variants for rewards in [0, 1]: [G, M] -> [G, M]. 0/0 counts as 0.

    `std` is "population", "bessel" or "none". For rewards of exactly 0 and 1 the result equals that of objectives.grpo.
    """
    check_group(rewards)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    if std == "none":
        return centred
    scale = rewards.std(dim=-1, keepdim=True, correction=int(std == "bessel")) + epsilon
    alike = rewards.amax(dim=-1, keepdim=True) == rewards.amin(dim=-1, keepdim=True)
    return torch.where(alike, 0.0, centred / scale)


def overlong_penalty(num_tokens: int, limit: int, interval: int) -> float:
    """Returns DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), in [0, 1], to subtract from the reward.

    It rises linearly over the last `interval` tokens before the limit, and is 0 before them.
    """
    return min(1.0, max(0.0, (num_tokens - (limit - interval)) / interval))


def whiten(batch: Batch, sum_over_data: Callable[[Tensor], Tensor], *, changes: bool = True) -> Metrics:
    """Gives the advantages mean 0 and variance 1 over the tokens of all ranks; returns their metrics from before.

    With `changes=False` it only measures and leaves the advantages as they are.
    """
    chosen = torch.cat([part.advantages.index_select(0, part.trained) for part in batch.microbatches]).double()
    sums = torch.stack([chosen.sum(), chosen.square().sum()])
    total, squares = sum_over_data(sums).tolist()
    mean = total / batch.num_tokens
    deviation = max(squares / batch.num_tokens - mean * mean, 0.0) ** 0.5
    for microbatch in batch.microbatches if changes else ():
        whitened = (microbatch.advantages - mean) / (deviation + 1e-8)
        microbatch.advantages = torch.where(microbatch.loss_mask, whitened, 0.0)
    return {"train/advantage_mean": mean, "train/advantage_std": deviation}


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {"leave_one_out": leave_one_out, "grpo": grpo}


def check_group(rewards: Tensor) -> None:
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [G, M] with M >= 2 samples a group, got {tuple(rewards.shape)}")


def gae(
    rewards: Tensor,  # [N, T]
    values: Tensor,  # [N, T]
    mask: Tensor,  # [N, T] bool
    discount: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Returns (advantages, returns), both [N, T] and 0 outside the mask (Schulman et al. 2016, eq. 16).

    A sequence ends with its last masked token; the value after it is 0. Numbers outside the mask are never read, and
    tokens that are masked out inside a sequence are skipped.
    """
    order = (~mask).int().argsort(dim=1, stable=True)  # The tokens inside the mask come first, in order.
    kept_rewards, kept_values = (torch.where(mask, part, 0.0).gather(1, order) for part in (rewards, values))
    delta = kept_rewards + discount * pad(kept_values, (0, 1))[:, 1:] - kept_values
    # A_t is the sum over k of factor^k delta_{t+k}; each addition doubles the number of its terms.
    factor, num_terms = discount * gae_lambda, 1
    while num_terms < values.shape[1]:
        delta = delta + factor**num_terms * pad(delta[:, num_terms:], (0, num_terms))
        num_terms *= 2
    advantages = torch.where(mask, torch.zeros_like(values).scatter(1, order, delta), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
