"""Lets the watchdogs of the ranks tell each other about a hang, by keys in the ranks' store, without a collective.

The store answers even while all main threads hang, because it is a file in a private folder, or a server in a C++
thread. If the store does not answer, the channel behaves as if there were no news, so that each watchdog acts alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist

from megatron_oreal.observability.stacks import RankState

FOUND, COUNT, OVER = "found", "count", "over"
POLL_SECONDS = 0.1


@dataclass(slots=True, frozen=True)
class Hang:
    """A phase that has exceeded its deadline on a rank, as reported by the first rank that noticed it."""

    name: str  # of the folder of its stacks
    rank: int
    phase: str
    step: int
    seconds: float
    deadline: float


class HangChannel:
    """One rank's end of the channel. `store` is None for a single rank. Only the watchdog's thread uses it."""

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size

    def found(self) -> Hang | None:
        """Returns the hang that a rank has found."""
        text = self._read(FOUND)
        return None if text is None else Hang(**json.loads(text))

    def tell(self, hang: Hang) -> Hang:
        """Tells all ranks about a hang; returns the hang that counts, because another rank may have been faster."""
        if self.store is None:
            return hang
        try:
            if self.store.add(COUNT, 1) == 1:
                self.store.set(FOUND, json.dumps(asdict(hang)))
                return hang
        except RuntimeError:
            return hang
        wait_for(lambda: self._read(FOUND) is not None, 5.0)
        return self.found() or hang

    def publish(self, state: RankState) -> None:
        self._write(f"rank {state.rank}", json.dumps(asdict(state)))

    def gather(self, own: RankState, seconds: float) -> dict[int, RankState]:
        """Waits up to the limit for the states of all ranks; returns those that arrived."""
        states = {own.rank: own}

        def is_complete() -> bool:
            for rank in range(self.world_size):
                if rank not in states and (text := self._read(f"rank {rank}")) is not None:
                    states[rank] = decode_state(text)
            return len(states) == self.world_size

        wait_for(is_complete, seconds)
        return states

    def finish(self) -> None:
        """Tells the other ranks that the hang has been described."""
        self._write(OVER, "yes")

    def is_over(self, seconds: float) -> bool:
        """Waits up to the limit until the first rank has described the hang."""
        return wait_for(lambda: self._read(OVER) is not None, seconds)

    def _read(self, key: str) -> str | None:
        if self.store is None:
            return None
        try:
            return self.store.get(key).decode() if self.store.check([key]) else None
        except RuntimeError:
            return None

    def _write(self, key: str, text: str) -> None:
        if self.store is None:
            return
        try:
            self.store.set(key, text)
        except RuntimeError:
            return


def open_channel(rank: int, world_size: int) -> HangChannel:
    """Opens a separate connection to the ranks' store, because the main thread may wait in the other one."""
    if world_size == 1:
        return HangChannel(None, rank, world_size)
    store: dist.Store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=30))
    return HangChannel(dist.PrefixStore("watchdog", store), rank, world_size)


def wait_for(is_done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_done():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_SECONDS)
    return True


def decode_state(text: str) -> RankState:
    state = RankState(**json.loads(text))
    return replace(state, threads=tuple(state.threads), requests=tuple(state.requests))
