"""Groups that are produced beside the training, up to `staleness` steps ahead of it.

A thread of the first rank produces one step's groups after the other; the main threads of all ranks take them together.
Step t begins when step t - staleness is asked for, and so when the weights of that step are on the servers: with
staleness 0 the thread works only while the trainer waits for it.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from concurrent.futures import Future

from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor
from megatron_oreal.rollout.collector import Collected
from megatron_oreal.rollout.group_broadcast import share
from megatron_oreal.rollout.group_codec import PlacedGroup
from megatron_oreal.rollout.producer import GroupProducer, Produced, ProductionStoppedError

CLOSE_SECONDS = 10.0  # for the engine to give up what is under way


class BackgroundCollector:
    """`cursor` stands where the collected groups end, whatever is produced ahead of them."""

    def __init__(
        self,
        producer: GroupProducer | None,  # of the first rank, with a cursor of its own
        cursor: PromptCursor[EncodedPrompt],
        staleness: int,
        first_step: int,
        num_steps: int,  # of the run: nothing is produced for later ones
    ) -> None:
        self.producer, self.cursor = producer, cursor
        self.staleness, self.first_step, self.num_steps = staleness, first_step, num_steps
        self.futures: defaultdict[int, Future[list[PlacedGroup]]] = defaultdict(Future)  # by step
        self.produced: dict[int, Produced] = {}
        self.last_wanted = first_step - staleness - 1  # the step that was asked for last
        self.is_closed = False
        self.changed = threading.Condition()  # guards all of the above
        self.thread: threading.Thread | None = None

    def collect(self, step: int) -> Collected:
        """Collective. An error of the production is raised here: on the first rank the error itself."""
        future = self._want(step) if self.producer is not None else None
        placed = share(future, self.cursor.prompts)
        groups = [one.group for one in placed if one.is_chosen]
        sampled = [one.group for one in placed]
        if future is None:
            return Collected(groups, sampled)
        with self.changed:
            produced = self.produced.pop(step)
            del self.futures[step]
        self.cursor.restore(produced.cursor_state)
        return Collected(groups, sampled, produced.metrics, produced.notes)

    def close(self) -> None:
        """Ends the thread; what it was producing is given up, and what has ended is in the ledger."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
        if self.producer is not None:
            self.producer.stop()
        if self.thread is not None:
            # A request may hang: the thread ends with the engine, which is closed after this, or with the process.
            self.thread.join(CLOSE_SECONDS)

    def _want(self, step: int) -> Future[list[PlacedGroup]]:
        if self.thread is None:
            self.thread = threading.Thread(target=self._produce_all, name="production", daemon=True)
            self.thread.start()
        with self.changed:
            self.last_wanted = step
            self.changed.notify_all()
            return self.futures[step]

    def _produce_all(self) -> None:
        assert self.producer is not None
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
            except BaseException as error:  # noqa: BLE001  # it belongs to the main thread, which collects
                future.set_exception(error)
                return
            with self.changed:
                self.produced[step] = produced
            future.set_result(produced.groups)
