"""Sends the groups that the first rank's rollout thread collects to every rank.

The main threads of all ranks meet in `share`. The first rank's main thread repeatedly tells the others what comes next:
the rollout is still under way (so a rollout may take longer than a collective), the engine needs all ranks for a part
of generation, the groups are ready, or the rollout has failed. Groups travel as flat integers (`group_codec`), not as
pickled lists. Texts and extracted answers stay on the first rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.parallel.collectives import is_alone
from megatron_oreal.rollout.group_codec import NumberedGroup, pack, unpack

Result = TypeVar("Result")

HEARTBEAT_SECONDS = 5.0
WORKING, GENERATE, FAILED, DONE = 0, 1, 2, 3  # the states that the first rank sends


class RolloutError(OSError):
    """The rollout failed on the first rank; the other ranks raise this with the first rank's message."""


def in_thread(function: Callable[[], Result]) -> Future[Result]:
    """Runs `function` in a daemon thread, so that a hanging function does not keep the process alive."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  # the future passes the error to the thread that waits for it
            future.set_exception(error)

    threading.Thread(target=run, name="rollout", daemon=True).start()
    return future


def share(
    future: Future[list[NumberedGroup]], engine: RolloutEngine, prompts: Sequence[EncodedPrompt], is_main: bool
) -> list[NumberedGroup]:
    """Returns the first rank's groups on all ranks. Collective; only main threads may call it.

    On the first rank (`is_main`) a rollout thread completes `future`; on the others the future stays empty. During the
    rollout the engine may need all ranks (`RolloutEngine.take_part`). The first rank raises an error of the rollout
    unchanged, and the others raise RolloutError with its message.
    """
    if is_main:
        future.add_done_callback(lambda _: engine.calls.wake())
    state = WORKING
    try:
        while state in (WORKING, GENERATE):
            next_state = wait_for_news(future, engine) if is_main else WORKING
            state = int(broadcast(torch.tensor(next_state)))
            if state == GENERATE:
                engine.take_part()
    except BaseException:
        engine.calls.close()  # otherwise a rollout thread that waits for this thread would never end
        raise
    if state == FAILED:
        message = broadcast_text(str(future.exception()) if is_main else "")
        if is_main:
            future.result()  # raises the original error
        raise RolloutError(message)
    if is_alone():
        return future.result()
    packed = pack(future.result()) if is_main else torch.empty(0, dtype=torch.int32)
    size = int(broadcast(torch.tensor(len(packed))))
    packed = broadcast(packed if is_main else torch.empty(size, dtype=torch.int32))
    return future.result() if is_main else unpack(packed, prompts)


def wait_for_news(future: Future[list[NumberedGroup]], engine: RolloutEngine) -> int:
    """Waits until the rollout needs all ranks or has ended, at most for one heartbeat; returns the next state."""
    if engine.calls.wait(future.done, HEARTBEAT_SECONDS):
        return GENERATE
    if not future.done():
        return WORKING
    return FAILED if future.exception() is not None else DONE


def broadcast(tensor: Tensor) -> Tensor:
    """Collective. Broadcasts the first rank's tensor in host memory, because a colocated server may use the GPUs."""
    if not is_alone():
        dist.broadcast(tensor, src=0)
    return tensor


def broadcast_text(text: str) -> str:
    """Collective. Broadcasts the first rank's text."""
    if is_alone():
        return text
    texts = [text]
    dist.broadcast_object_list(texts, src=0)
    return texts[0]
