"""Turns rewards into advantages: pure functions of tensors, in the dtype that they are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other rewards of the group (RLOO, Ahmadian et al. 2024; OREAL eq. 8).

    rewards [G, M] -> [G, M]. Raises ValueError for M < 2.
    """
    check_group(rewards)
    others = rewards.sum(dim=-1, keepdim=True) - rewards
    return rewards - others / (rewards.shape[-1] - 1)


def grpo(rewards: Tensor) -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-8) with Bessel's correction (Shao et al. 2024, eq. 3).

    rewards [G, M] -> [G, M]. Raises ValueError for M < 2.
    """
    check_group(rewards)
    centred = rewards - rewards.mean(dim=-1, keepdim=True)
    return centred / (rewards.std(dim=-1, keepdim=True) + 1e-8)


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
    order = (~mask).int().argsort(dim=1, stable=True)  # The masked tokens come first, in their order.
    kept_rewards, kept_values = (torch.where(mask, part, 0.0).gather(1, order) for part in (rewards, values))
    delta = kept_rewards + discount * pad(kept_values, (0, 1))[:, 1:] - kept_values
    # A_t is the sum over k of factor^k delta_{t+k}; each addition doubles the number of its terms.
    factor, num_terms = discount * gae_lambda, 1
    while num_terms < values.shape[1]:
        delta = delta + factor**num_terms * pad(delta[:, num_terms:], (0, num_terms))
        num_terms *= 2
    advantages = torch.where(mask, torch.zeros_like(values).scatter(1, order, delta), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
