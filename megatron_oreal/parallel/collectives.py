"""Collectives of Python objects. All ranks of the group call each of these functions at the same point of the program.

A process that runs alone gets the same answers without torch.distributed.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
Error = TypeVar("Error", bound=Exception)


def is_alone(group: dist.ProcessGroup | None = None) -> bool:
    """Returns whether this process is the only rank. This function is not a collective."""
    return not dist.is_initialized() or dist.get_world_size(group) == 1


def all_gather_object(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """Returns the value of every rank, in the order of the ranks."""
    if is_alone(group):
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Result, source: int = 0, group: dist.ProcessGroup | None = None) -> Result:
    """Returns the value of the rank `source`, which is a global rank; what the other ranks pass is ignored."""
    if is_alone(group):
        return value
    values = [value]
    dist.broadcast_object_list(values, source, group=group)
    return values[0]


def gather_object(value: Result) -> list[Result]:
    """Returns the value of every rank, in the order of the ranks, on the first rank; an empty list on the others."""
    if is_alone():
        return [value]
    is_first = dist.get_rank() == 0
    values: list[Any] | None = [None] * dist.get_world_size() if is_first else None
    dist.gather_object(value, values)
    return values or []


def wait_for_all_ranks() -> None:
    """Returns when every rank has come this far."""
    all_gather_object(None)  # unlike dist.barrier it needs no GPU, whatever the group's backend is


def first_of(errors: Sequence[Error]) -> Error:
    return errors[0]


def raise_on_all(error: Error | None, merge: Callable[[Sequence[Error]], Error] = first_of) -> None:
    """Raises an error on every rank when at least one rank has met an error; None says that this rank has met none.

    `merge` makes one error of those that the ranks have met, given in the order of the ranks; by default the first one
    counts. The errors travel as pickles, so they must be made of plain values.
    """
    errors = [met for met in all_gather_object(error) if met is not None]
    if errors:
        merged = merge(errors)
        if merged is error:  # this process is alone
            raise merged
        raise merged from error


def run_on_all(action: Callable[[], Result], os_error: type[OSError] = OSError) -> list[Result]:
    """Runs `action` on every rank and returns what it gives on each of them, in the order of the ranks.

    When it raises a ValueError or an OSError on one rank, every rank raises it: as a ValueError, or as `os_error`. The
    message names the host where the ranks run on several.
    """
    results: list[Result] = []
    error: ValueError | OSError | None = None
    has_several_hosts = len(set(all_gather_object(socket.gethostname()))) > 1
    try:
        results.append(action())
    except (ValueError, OSError) as caught:
        message = f"on {socket.gethostname()}: {caught}" if has_several_hosts else str(caught)
        error = ValueError(message) if isinstance(caught, ValueError) else os_error(message)
        error.__cause__ = caught
    raise_on_all(error)
    return all_gather_object(results[0])
