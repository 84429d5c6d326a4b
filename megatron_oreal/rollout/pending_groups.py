"""Collects the responses to a set of prompts into groups, and decides when there are enough groups."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from megatron_oreal.algorithms.sample_selection import is_mixed
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.engines.engine import ALONE, BatchIndex, Generation, GenerationRequest
from megatron_oreal.types import Group

DEFAULT_JUDGING_THREADS = 4


@dataclass(slots=True, frozen=True)
class PromptRequest:
    """A prompt to be sampled. Example: PromptRequest(prompt, "0/7/3"), the prompt at index 3 of step 7."""

    prompt: EncodedPrompt
    seed_key: str  # determines the samples' seeds, together with their number in the group

    def requests(self, num_samples: int) -> list[GenerationRequest]:
        """Returns one request for each sample of the group."""
        seeds = (sample_seed(f"{self.seed_key}/{number}") for number in range(num_samples))
        return [GenerationRequest(self.prompt.token_ids, seed) for seed in seeds]


@dataclass(slots=True, frozen=True)
class StopCondition:
    """The condition to abandon the remaining responses: `num_groups` usable groups are complete."""

    num_groups: int
    needs_mixed: bool  # whether usable groups must have correct and incorrect samples


Judge = Callable[[PromptRequest, Sequence[Generation]], Group]


class JudgingTime:
    """Measures the time of verification, the groups that wait for it, and its overlap with generation."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seconds = 0.0  # total time of all threads
        self.queue_length = 0  # groups that were submitted but not judged yet
        self.longest_queue = 0
        self.last_end = 0.0  # when the last group was judged; 0 before

    def hand_in(self) -> None:
        with self.lock:
            self.queue_length += 1
            self.longest_queue = max(self.longest_queue, self.queue_length)

    def measured(self, judge: Judge) -> Judge:
        def judge_group(request: PromptRequest, generations: Sequence[Generation]) -> Group:
            begin = time.monotonic()
            try:
                return judge(request, generations)
            finally:
                with self.lock:
                    self.last_end = time.monotonic()
                    self.seconds += self.last_end - begin
                    self.queue_length -= 1

        return judge_group


class PendingGroups:
    """A `Watch` that receives the engine's responses and judges each group when its last response has arrived.

    Request i belongs to prompt i // num_samples. Separate threads judge groups during generation. Only if a stop
    condition depends on verdicts does the engine's call wait for the judge. Without a stop condition nothing is
    abandoned, and the groups of a batch are judged when its last response has arrived, so that a judge that waits for
    the disk waits once for the whole batch. An error of `judge` or `keep` ends the collection, and `groups` raises it.
    Responses that arrive after the end are ignored.
    """

    def __init__(
        self,
        prompt_requests: Sequence[PromptRequest],
        num_samples: int,
        judge: Judge,
        stop_condition: StopCondition | None = None,
        keep: Callable[[int, Generation, BatchIndex], None] | None = None,  # receives each accepted response
        num_judging: int = DEFAULT_JUDGING_THREADS,  # groups that are verified concurrently
    ) -> None:
        self.prompt_requests, self.num_samples = prompt_requests, num_samples
        self.judging_time = JudgingTime()
        self.judge = self.judging_time.measured(judge)
        self.stop_condition, self.keep = stop_condition, keep
        self.finished: dict[int, Generation] = {}  # by request number
        self.seconds: list[float] = []  # from the start to each response
        self.is_over = False
        self.num_usable = 0
        self.complete: list[int] = []  # prompts whose groups wait for the end of the batch
        self.judged: dict[int, Future[Group]] = {}  # by prompt, in the order of completion
        self.error: Exception | None = None
        self.start = time.monotonic()
        self.lock = threading.Lock()
        self.judging = ThreadPoolExecutor(num_judging, "judging")

    def __call__(self, index: int, generation: Generation, batch: BatchIndex = ALONE) -> bool:
        with self.lock:
            if not self.is_over and generation.finish_reason != "abort" and index not in self.finished:
                try:
                    if self.keep is not None:
                        self.keep(index, generation, batch)
                    self._take(index, generation)
                    if self.stop_condition is not None or batch.position == batch.size - 1:
                        self._judge_complete()
                except Exception as error:  # noqa: BLE001  # `groups` raises it, because it is not the engine's error
                    self.error, self.is_over = error, True
                else:
                    self.seconds.append(time.monotonic() - self.start)
            return self.is_over

    def take_known(self, index: int, generation: Generation) -> None:
        """Accepts a response from the ledger, without calling `keep` again and without counting time."""
        with self.lock:
            if not self.is_over:
                self._take(index, generation)
                self._judge_complete()

    def groups(self) -> dict[int, Group]:
        """Returns the complete groups by their prompt's number, in the order of completion."""
        if self.error is not None:
            raise self.error
        with self.lock:
            self._judge_complete()  # for a batch whose last response was not accepted
        return {number: judged.result() for number, judged in self.judged.items()}

    @property
    def seconds_after_generation(self) -> float:
        """Returns how long verification continued after the last response, when generation no longer hides it."""
        last_response = self.start + max(self.seconds, default=0.0)
        return max(0.0, self.judging_time.last_end - last_response) if self.judging_time.last_end else 0.0

    def stop(self) -> None:
        """Abandons the missing responses."""
        self.is_over = True

    def close(self) -> None:
        self.judging.shutdown(wait=False, cancel_futures=True)

    def _take(self, index: int, generation: Generation) -> None:
        self.finished[index] = generation
        number = index // self.num_samples
        members = range(number * self.num_samples, (number + 1) * self.num_samples)
        if all(member in self.finished for member in members):
            self.complete.append(number)

    def _judge_complete(self) -> None:
        for number in self.complete:
            first = number * self.num_samples
            generations = [self.finished[member] for member in range(first, first + self.num_samples)]
            self.judging_time.hand_in()
            self.judged[number] = self.judging.submit(self.judge, self.prompt_requests[number], generations)
            if self.stop_condition is not None:
                needs_mixed = self.stop_condition.needs_mixed
                self.num_usable += not needs_mixed or is_mixed(self.judged[number].result())
                self.is_over = self.num_usable >= self.stop_condition.num_groups
        self.complete.clear()


def sample_seed(key: str) -> int:
    """Returns a 63-bit seed, which is the same on every machine and in every Python version."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
