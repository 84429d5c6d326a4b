"""Collectives of Python objects: what all ranks must agree on."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def exchanged(value: Result) -> list[Result]:
    """Collective. Every rank's value, in the ranks' order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
