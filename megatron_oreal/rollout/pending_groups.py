"""The responses to a set of prompts as they come in, and the moment when there are enough of them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from megatron_oreal.algorithms.sample_selection import is_mixed
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.engines.engine import Generation, GenerationRequest
from megatron_oreal.types import Group


@dataclass(slots=True, frozen=True)
class Asked:
    prompt: EncodedPrompt
    origin: str  # what its samples' seeds depend on, besides their number

    def requests(self, num_samples: int) -> list[GenerationRequest]:
        seeds = (sample_seed(f"{self.origin}/{number}") for number in range(num_samples))
        return [GenerationRequest(self.prompt.token_ids, seed) for seed in seeds]


@dataclass(slots=True, frozen=True)
class Goal:
    """With so many usable groups, the rest may be given up."""

    num_groups: int
    needs_mixed: bool  # a group of one kind is not usable


Judge = Callable[[Asked, Sequence[Generation]], Group]


class Harvest:
    """A `Watch`. Request i belongs to prompt i // num_samples; a group is judged when its last response is there.

    Without a goal nothing is given up. Judging runs beside the generation, in a thread of its own; only where the goal
    depends on verdicts does the engine's call wait for it. An error of the judge, or of `keep`, ends the harvest and
    comes out of `groups`. What is told after the end is not taken.
    """

    def __init__(
        self,
        asked: Sequence[Asked],
        num_samples: int,
        judge: Judge,
        goal: Goal | None = None,
        keep: Callable[[int, Generation], None] | None = None,  # told of each response that is taken
    ) -> None:
        self.asked, self.num_samples, self.judge, self.goal, self.keep = asked, num_samples, judge, goal, keep
        self.finished: dict[int, Generation] = {}  # by request
        self.seconds: list[float] = []  # from the start to each response
        self.is_over = False
        self.num_usable = 0
        self.judged: dict[int, Future[Group]] = {}  # by prompt, in the order in which groups were complete
        self.error: Exception | None = None
        self.start = time.monotonic()
        self.lock = threading.Lock()
        self.judging = ThreadPoolExecutor(1, "judging")

    def __call__(self, index: int, generation: Generation) -> bool:
        with self.lock:
            if not self.is_over and generation.finish_reason != "abort" and index not in self.finished:
                try:
                    if self.keep is not None:
                        self.keep(index, generation)
                    self._take(index, generation)
                except Exception as error:  # noqa: BLE001  # the engine calls: it belongs to who reads the groups
                    self.error, self.is_over = error, True
                else:
                    self.seconds.append(time.monotonic() - self.start)
            return self.is_over

    def take_known(self, index: int, generation: Generation) -> None:
        """A response that was there before."""
        with self.lock:
            if not self.is_over:
                self._take(index, generation)

    def groups(self) -> dict[int, Group]:
        """The complete groups by their prompt's number, in the order in which they were complete."""
        if self.error is not None:
            raise self.error
        return {number: judged.result() for number, judged in self.judged.items()}

    def stop(self) -> None:
        """Whatever is missing is given up."""
        self.is_over = True

    def close(self) -> None:
        self.judging.shutdown(wait=False, cancel_futures=True)

    def _take(self, index: int, generation: Generation) -> None:
        self.finished[index] = generation
        number = index // self.num_samples
        members = range(number * self.num_samples, (number + 1) * self.num_samples)
        if all(member in self.finished for member in members):
            generations = [self.finished[member] for member in members]
            self.judged[number] = self.judging.submit(self.judge, self.asked[number], generations)
            if self.goal is not None:
                self.num_usable += not self.goal.needs_mixed or is_mixed(self.judged[number].result())
                self.is_over = self.num_usable >= self.goal.num_groups


def sample_seed(key: str) -> int:
    """A 63-bit seed, the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
