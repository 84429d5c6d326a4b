"""A step's groups from servers: over-sampling, what is given up and what comes of it, and the ledger.

The first rank alone does this, in any thread.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_oreal.algorithms.sample_selection import is_mixed
from megatron_oreal.config import RolloutConfig
from megatron_oreal.data.prompts import CursorState, EncodedPrompt, PromptCursor, Turn
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams
from megatron_oreal.observability.metrics import Metrics
from megatron_oreal.rollout.collector import draw_again, seed_of
from megatron_oreal.rollout.group_codec import PlacedGroup
from megatron_oreal.rollout.ledger import Ledger, response_key
from megatron_oreal.rollout.metrics import nearest_rank
from megatron_oreal.rollout.pending_groups import Asked, Goal, Harvest
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import Group


class ProductionStoppedError(Exception):
    """The run ends in the middle of a step's production."""


@dataclass(slots=True, frozen=True)
class Produced:
    groups: list[PlacedGroup]
    cursor_state: CursorState  # afterwards
    metrics: Metrics
    notes: list[str]


@dataclass(slots=True)
class GroupProducer:
    sampler: Sampler
    cursor: PromptCursor[EncodedPrompt]  # of what was asked, which may be ahead of what was trained on
    sampling: SamplingParams
    config: RolloutConfig
    prompts_per_step: int
    num_correct: int  # that each prompt should have; 0: whatever comes
    needs_mixed: bool  # the algorithm leaves out groups of one kind: over-sampling replaces them
    seed: int
    ledger: Ledger
    harvest: Harvest | None = None  # under way
    is_stopped: bool = False
    counts: Counter[str] = field(default_factory=Counter)  # of the step under way
    seconds: list[float] = field(default_factory=list)  # from the step's start to each of its responses
    start: float = 0.0

    def produce(self, step: int) -> Produced:
        """The groups of `step`, all with weights of version step - staleness or later.

        With `prompt_rounds` > 1, new prompts are asked until `prompts_per_step` groups are mixed. Which groups are
        chosen depends on the order in which they end only where there is over-sampling. Raises ProductionStoppedError
        after `stop`.
        """
        self.counts, self.seconds, self.start = Counter(), [], time.monotonic()
        assert self.sampler.engine.version >= step - self.config.staleness, "the servers' weights are too old"
        groups: list[PlacedGroup] = []
        num_chosen = 0
        for prompt_round in range(self.config.prompt_rounds):
            turns = self.cursor.next_turns(math.ceil(self.prompts_per_step * self.config.oversampling))
            seed = seed_of(f"{self.seed}/{step}", "prompts", prompt_round)
            fresh = self._ask(step, turns, seed, self.prompts_per_step - num_chosen)
            num_chosen += sum(placed.is_chosen for placed in fresh)
            groups += fresh
            if num_chosen >= self.prompts_per_step:
                break
        self.ledger.finish(step)
        return Produced(groups, self.cursor.state(), self._metrics(), self._notes(step))

    def stop(self) -> None:
        """From another thread: gives up what is under way."""
        self.is_stopped = True
        if self.harvest is not None:
            self.harvest.stop()

    @property
    def _is_filtered(self) -> bool:
        return self.config.prompt_rounds > 1 or (self.needs_mixed and self.config.oversampling > 1)

    @property
    def _resumes(self) -> bool:
        return self.config.unfinished == "resume"

    def _ask(self, step: int, turns: Sequence[Turn], seed: str, num_missing: int) -> list[PlacedGroup]:
        """One round of prompts: the complete groups, in the prompts' order; the other prompts are given back."""
        asked = [
            Asked(self.cursor.prompts[turn.index], turn.origin or f"{seed}/{place}") for place, turn in enumerate(turns)
        ]
        goal = Goal(num_missing, self._is_filtered) if self.config.oversampling > 1 else None
        found = self._gather(step, asked, goal)
        places = sorted(found)
        groups = [found[place] for place in places]

        def draw(missing: Sequence[int], seed: str) -> list[Group]:
            again = [Asked(asked[places[index]].prompt, f"{seed}/{number}") for number, index in enumerate(missing)]
            return [group for _, group in sorted(self._gather(step, again, None).items())]

        draw_again(groups, self.num_correct, self.config.draw_rounds, seed, draw)
        usable = [place for place in places if not self._is_filtered or is_mixed(found[place])]
        chosen = set(usable[:num_missing])
        given_up = [place for place in range(len(turns)) if place not in found]
        # A response that is resumed keeps its seed; one that is drawn anew gets that of its new place.
        self.cursor.give_back([Turn(turns[place].index, asked[place].origin * self._resumes) for place in given_up])
        return [PlacedGroup(turns[place].index, found[place], place in chosen) for place in places]

    def _gather(self, step: int, asked: Sequence[Asked], goal: Goal | None) -> dict[int, Group]:
        """The complete groups by their place; all, without a goal."""
        requests = [request for one in asked for request in one.requests(self.config.group_size)]
        keys = [response_key(request, self.sampling) for request in requests]

        def keep(number: int, generation: Generation) -> None:
            if len(generation.response_ids):
                self.ledger.add(step, keys[number], generation)

        def judge(one: Asked, generations: Sequence[Generation]) -> Group:
            self.ledger.sync(step)
            return self.sampler.judge(one, generations)

        self.harvest = harvest = Harvest(asked, self.config.group_size, judge, goal, keep)
        if self.is_stopped:
            harvest.stop()
        try:
            left = self.sampler.gather(harvest, self._known(step, harvest, requests, keys), self.sampling)
            if self.is_stopped:
                raise ProductionStoppedError
            groups = harvest.groups()
        finally:
            harvest.close()
        self.seconds += [harvest.start - self.start + seconds for seconds in harvest.seconds]
        for number, key in enumerate(keys):
            if number // self.config.group_size not in groups:
                begun = left[number].begun if number in left else None
                self._give_up(step, key, harvest.finished.get(number, begun))
        self.ledger.sync(step + 1)
        return groups

    def _known(
        self, step: int, harvest: Harvest, requests: Sequence[GenerationRequest], keys: Sequence[str]
    ) -> dict[int, GenerationRequest]:
        """What is left to generate besides the responses that the ledger holds, and those that go on from there."""
        oldest = step - max(self.config.staleness, int(self._resumes))
        found = {number: record for number, key in enumerate(keys) if (record := self.ledger.find(step, key, oldest))}
        left = dict(enumerate(requests))
        for number, record in sorted(found.items(), key=lambda item: item[1].place):
            generation = record.generation
            if record.oldest_version < oldest:
                self.counts["restarted"] += 1
                continue
            left[number] = replace(requests[number], begun=generation)
            if generation.finish_reason == "abort":
                self.counts["resumed"] += 1
            else:
                self.counts["carried" if record.header.is_carried else "found"] += 1
                harvest.take_known(number, generation)
        return {number: request for number, request in left.items() if number not in harvest.finished}

    def _give_up(self, step: int, key: str, generation: Generation | None) -> None:
        """Drops a response of an incomplete group, or hands it to the next step."""
        self.counts["given_up"] += generation is None or generation.finish_reason == "abort"
        if generation is not None and len(generation.response_ids):
            self.counts["tokens_given_up"] += len(generation.response_ids)
            if self._resumes:
                self.ledger.carry(step + 1, key, generation)

    def _metrics(self) -> Metrics:
        """What over-sampling cost, and how long the first, the median, the 90 % and the last responses took."""
        names = ("given_up", "tokens_given_up", "carried", "resumed", "restarted")
        metrics: Metrics = {f"rollout/num_{name}": self.counts[name] for name in names}
        if self.seconds:
            for name, share in {"first": 0.0, "half": 0.5, "nine_tenths": 0.9, "last": 1.0}.items():
                metrics[f"time/in_rollout/{name}_response"] = nearest_rank(self.seconds, share)
        return metrics

    def _notes(self, step: int) -> list[str]:
        num_found = self.counts["found"]
        return [f"step {step}: {num_found} responses of the interrupted run were in the ledger"] if num_found else []
