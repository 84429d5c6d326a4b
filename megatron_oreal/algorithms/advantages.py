"""From rewards to advantages. Pure functions of tensors, in the dtype that they are given."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


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
    """(advantages, returns), both [N, T] and 0 outside the mask (Schulman et al. 2016, eq. 16).

    A sequence ends with its last masked token: the value after it is 0. What stands outside the mask is never read;
    masked-out tokens inside a sequence are stepped over.
    """
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # the advantage of the next masked token
    next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        kept = mask[:, t]
        delta = rewards[:, t] + discount * next_value - values[:, t]
        here = delta + discount * gae_lambda * following
        following = torch.where(kept, here, following)
        next_value = torch.where(kept, values[:, t], next_value)
        advantages[:, t] = torch.where(kept, here, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
