"""Collects each step's groups, up to `staleness` steps ahead of the training.

A thread of the first rank, the production thread, makes the groups of one step after the other; the main threads of all
ranks take them together. The production of step t begins when the trainer requests step t - staleness, so the engine
then has the weights of that step. With staleness 0 the production thread works only while the trainer waits for it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor
from megatron_oreal.observability.metrics import Metrics
from megatron_oreal.rollout.group_broadcast import share
from megatron_oreal.rollout.group_codec import NumberedGroup
from megatron_oreal.rollout.producer import GroupProducer, Produced, ProductionStoppedError
from megatron_oreal.types import Group

CLOSE_SECONDS = 10.0  # for the engine to abandon what is under way


@dataclass(slots=True, frozen=True)
class Collected:
    """One step's groups, as every rank receives them."""

    groups: list[Group]  # to train on
    sampled: list[Group]  # all groups, including unusable ones
    metrics: Metrics = field(default_factory=dict)  # of the production; empty on the other ranks
    notes: list[str] = field(default_factory=list)  # for the log


class PrefetchingCollector:
    """Hands out the groups that the first rank's producer makes.

    `cursor` is at the end of the collected groups. The producer has its own cursor, which may be ahead. The other ranks
    have a producer too, but never use it.
    """

    def __init__(
        self,
        producer: GroupProducer,
        cursor: PromptCursor[EncodedPrompt],
        is_main: bool,
        first_step: int,
        num_steps: int,  # of the run; the thread produces nothing for later steps
    ) -> None:
        self.producer, self.cursor, self.is_main = producer, cursor, is_main
        self.staleness = producer.config.staleness
        self.first_step, self.num_steps = first_step, num_steps
        self.futures: defaultdict[int, Future[list[NumberedGroup]]] = defaultdict(Future)  # by step
        self.produced: dict[int, Produced] = {}
        self.last_wanted = first_step - self.staleness - 1  # the last requested step
        self.is_closed = False
        self.changed = threading.Condition()  # guards all fields above
        self.thread: threading.Thread | None = None

    def collect(self, step: int) -> Collected:
        """Returns the groups of `step` on all ranks. Collective; only main threads may call it.

        Raises an error of the production; the first rank raises the original error.
        """
        future = self._want(step)
        numbered = share(future, self.producer.sampler.engine, self.cursor.prompts, self.is_main)
        groups = [one.group for one in numbered if one.is_chosen]
        sampled = [one.group for one in numbered]
        if not self.is_main:
            return Collected(groups, sampled)
        with self.changed:
            produced = self.produced.pop(step)
            del self.futures[step]
        self.cursor.restore(produced.cursor_state)
        return Collected(groups, sampled, produced.metrics, produced.notes)

    def close(self) -> None:
        """Ends the thread and abandons its production. Finished responses are in the ledger."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        self.producer.stop()
        if self.thread is not None:
            # A request may hang. The thread then ends when the engine closes, after this, or with the process.
            self.thread.join(CLOSE_SECONDS)

    def _want(self, step: int) -> Future[list[NumberedGroup]]:
        """Lets the production thread begin the next steps; on the other ranks the future stays empty."""
        if not self.is_main:
            return Future()
        if self.thread is None:
            self.thread = threading.Thread(target=self._produce_all, name="production", daemon=True)
            self.thread.start()
        with self.changed:
            self.last_wanted = step
            self.changed.notify_all()
            return self.futures[step]

    def _produce_all(self) -> None:
        for step in range(self.first_step, self.num_steps):
            with self.changed:
                while not self.is_closed and self.last_wanted < step - self.staleness:
                    self.changed.wait()
                if self.is_closed:
                    return
                future = self.futures[step]
            try:
                produced = self.producer.produce(step)
            except ProductionStoppedError:
                return
            except BaseException as error:  # noqa: BLE001  # the main thread, which collects, raises the error
                future.set_exception(error)
                return
            with self.changed:
                self.produced[step] = produced
            future.set_result(produced.groups)
