"""Groups from the first rank, which asks the servers, to all others: flat integers, not pickled lists.

Texts and extracted answers stay on the first rank. The others learn now and then that it is still at work, so a rollout
may take longer than a collective.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.engines.sglang.client import ServerError
from megatron_oreal.parallel.collectives import is_alone
from megatron_oreal.rollout.group_codec import PlacedGroup, pack, unpack

Result = TypeVar("Result")

HEARTBEAT_SECONDS = 5.0
WORKING, FAILED, DONE = 0, 1, 2  # what the first rank says of its rollout


def in_thread(function: Callable[[], Result]) -> Future[Result]:
    """A daemon thread's result: one that hangs does not keep the process alive."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  # it belongs to who waits for the future
            future.set_exception(error)

    threading.Thread(target=run, name="rollout", daemon=True).start()
    return future


def share(future: Future[list[PlacedGroup]] | None, prompts: Sequence[EncodedPrompt]) -> list[PlacedGroup]:
    """The first rank's groups, on all ranks; `future` is None on the others. Collective.

    An error of the first rank is raised there, and as ServerError with its message on the others.
    """
    if is_alone():
        assert future is not None
        return future.result()
    # On the CPU in any case: the GPU may be a colocated server's meanwhile.
    packed, state = torch.empty(0, dtype=torch.int32), WORKING
    while state == WORKING:
        if future is not None:
            state = poll(future)
            packed = pack(future.result()) if state == DONE else packed
        header = torch.tensor([state, len(packed)])
        dist.broadcast(header, src=0)
        state, size = header.tolist()
    if state == FAILED:
        message = [str(future.exception()) if future is not None else ""]
        dist.broadcast_object_list(message, src=0)
        if future is not None:
            future.result()
        raise ServerError(message[0])
    if future is None:
        packed = torch.empty(size, dtype=torch.int32)
    dist.broadcast(packed, src=0)
    return future.result() if future is not None else unpack(packed, prompts)


def poll(future: Future[list[PlacedGroup]]) -> int:
    """Waits for it, but not for long."""
    if not wait([future], timeout=HEARTBEAT_SECONDS).done:
        return WORKING
    return FAILED if future.exception() is not None else DONE
