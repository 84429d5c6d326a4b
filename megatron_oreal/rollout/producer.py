"""Makes a step's groups: rounds of prompts, over-sampling, treatment of abandoned responses, and the ledger.

Only the first rank does this, in the production thread (`prefetch.py`).
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_oreal.algorithms.sample_selection import is_mixed
from megatron_oreal.config import RolloutConfig
from megatron_oreal.data.prompts import CursorState, EncodedPrompt, PromptCursor, Turn
from megatron_oreal.engines.engine import BatchIndex, Generation, GenerationRequest, SamplingParams
from megatron_oreal.observability.metrics import Metrics
from megatron_oreal.rollout.group_codec import NumberedGroup
from megatron_oreal.rollout.ledger import Ledger, response_key
from megatron_oreal.rollout.metrics import judge_metrics, nearest_rank
from megatron_oreal.rollout.pending_groups import PendingGroups, PromptRequest, StopCondition
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import Group


class ProductionStoppedError(Exception):
    """Raised if the run ends during the production of a step's groups."""


@dataclass(slots=True, frozen=True)
class Produced:
    """A step's groups, and the run's record of their production."""

    groups: list[NumberedGroup]
    cursor_state: CursorState  # the end of the step's prompts
    metrics: Metrics
    notes: list[str]


@dataclass(slots=True)
class GroupProducer:
    sampler: Sampler
    cursor: PromptCursor[EncodedPrompt]  # of the requested prompts, which may be ahead of the trained ones
    sampling: SamplingParams
    config: RolloutConfig
    prompts_per_step: int
    num_correct: int  # correct samples that each prompt should have; 0: no condition
    needs_mixed: bool  # whether training skips groups that are all correct or all incorrect
    seed: int
    ledger: Ledger
    pending: PendingGroups | None = None  # the groups under way
    is_stopped: bool = False
    counts: Counter[str] = field(default_factory=Counter)  # of the current step
    seconds: list[float] = field(default_factory=list)  # from the step's start to each of its responses
    verification: dict[str, float] = field(default_factory=dict)  # seconds in the current step
    longest_queue: int = 0  # of groups that waited for their verdicts
    start: float = 0.0

    def produce(self, step: int) -> Produced:
        """Makes the groups of `step`, all with weights of version step - staleness or later.

        With `prompt_rounds` > 1, it requests new prompts until `prompts_per_step` groups are mixed (DAPO). The choice
        of groups depends on the order in which they end only with over-sampling. Raises ProductionStoppedError after
        `stop`.
        """
        self.counts, self.seconds, self.start = Counter(), [], time.monotonic()
        self.verification, self.longest_queue = {"seconds": 0.0, "seconds_after_generation": 0.0}, 0
        # This drops the numbers of an evaluation, which do not belong to this step.
        self.sampler.verifier.flush_metrics()
        assert self.sampler.engine.version >= step - self.config.staleness, "the engine's weights are too old"
        groups: list[NumberedGroup] = []
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
        metrics = self._metrics() | judge_metrics([numbered.group for numbered in groups])
        return Produced(groups, self.cursor.state(), metrics, self._notes(step))

    def stop(self) -> None:
        """Abandons what is under way. The main thread calls this while another thread produces."""
        self.is_stopped = True
        if self.pending is not None:
            self.pending.stop()

    @property
    def _is_filtered(self) -> bool:
        return self.config.prompt_rounds > 1 or (self.needs_mixed and self.config.oversampling > 1)

    @property
    def _resumes(self) -> bool:
        return self.config.resumes

    def _ask(self, step: int, turns: Sequence[Turn], seed: str, num_missing: int) -> list[NumberedGroup]:
        """Samples one round of prompts; returns the complete groups in the prompts' order.

        The prompts of the incomplete groups go back to the cursor.
        """
        requests = [
            PromptRequest(self.cursor.prompts[turn.index], turn.origin or f"{seed}/{index}")
            for index, turn in enumerate(turns)
        ]
        stop_condition = StopCondition(num_missing, self._is_filtered) if self.config.oversampling > 1 else None
        complete = self._gather(step, requests, stop_condition)
        indices = sorted(complete)
        groups = [complete[index] for index in indices]

        def draw(missing: Sequence[int], seed: str) -> list[Group]:
            prompts = [requests[indices[position]].prompt for position in missing]
            again = [PromptRequest(prompt, f"{seed}/{number}") for number, prompt in enumerate(prompts)]
            return [group for _, group in sorted(self._gather(step, again, None).items())]

        draw_again(groups, self.num_correct, self.config.draw_rounds, seed, draw)
        usable = [index for index in indices if not self._is_filtered or is_mixed(complete[index])]
        chosen = set(usable[:num_missing])
        given_up = [index for index in range(len(turns)) if index not in complete]
        # A resumed response keeps its seed; a response that is sampled anew gets the seed of its new index.
        self.cursor.give_back(
            [Turn(turns[index].index, requests[index].seed_key if self._resumes else "") for index in given_up]
        )
        return [NumberedGroup(turns[index].index, complete[index], index in chosen) for index in indices]

    def _gather(
        self, step: int, prompt_requests: Sequence[PromptRequest], stop_condition: StopCondition | None
    ) -> dict[int, Group]:
        """Returns the complete groups by their prompt's index, which are all groups if there is no stop condition."""
        size = self.config.group_size
        requests = [request for one in prompt_requests for request in one.requests(size)]
        keys = [response_key(request, self.sampling) for request in requests]

        def keep(number: int, generation: Generation, batch: BatchIndex) -> None:
            if len(generation.response_ids):
                self.ledger.add(step, keys[number], generation, batch)

        def judge(request: PromptRequest, generations: Sequence[Generation]) -> Group:
            self.ledger.sync(step)
            return self.sampler.judge(request, generations)

        num_judging = self.sampler.verifier.num_concurrent
        self.pending = pending = PendingGroups(prompt_requests, size, judge, stop_condition, keep, num_judging)
        if self.is_stopped:
            pending.stop()
        try:
            left = self.sampler.gather(pending, self._missing(step, pending, requests, keys), self.sampling)
            if self.is_stopped:
                raise ProductionStoppedError
            groups = pending.groups()
        finally:
            pending.close()
        self.verification["seconds"] += pending.judging_time.seconds
        self.verification["seconds_after_generation"] += pending.seconds_after_generation
        self.longest_queue = max(self.longest_queue, pending.judging_time.longest_queue)
        self.seconds += [pending.start - self.start + seconds for seconds in pending.seconds]
        for number, key in enumerate(keys):
            if number // size not in groups:
                begun = left[number].begun if number in left else None
                self._give_up(step, key, pending.finished.get(number, begun))
        self.ledger.sync(step + 1)
        return groups

    def _missing(
        self, step: int, pending: PendingGroups, requests: Sequence[GenerationRequest], keys: Sequence[str]
    ) -> dict[int, GenerationRequest]:
        """Returns the requests without a complete response in the ledger; passes the complete responses to `pending`.

        A request with a partial response in the ledger continues that response.
        """
        oldest = step - max(self.config.staleness, int(self._resumes))
        found = {number: record for number, key in enumerate(keys) if (record := self.ledger.find(step, key, oldest))}
        missing = dict(enumerate(requests))
        for number, record in sorted(found.items(), key=lambda item: item[1].place):
            generation = record.generation
            if record.oldest_version < oldest:
                self.counts["restarted"] += 1
                continue
            missing[number] = replace(requests[number], begun=generation)
            if generation.finish_reason == "abort":
                self.counts["resumed"] += 1
            else:
                self.counts["carried" if record.header.is_carried else "found"] += 1
                pending.take_known(number, generation)
        return {number: request for number, request in missing.items() if number not in pending.finished}

    def _give_up(self, step: int, key: str, generation: Generation | None) -> None:
        """Drops a response of an incomplete group, or passes it to the next step if the run resumes responses."""
        is_whole = generation is not None and generation.finish_reason != "abort"
        self.counts["given_up"] += not is_whole
        self.counts["whole_given_up"] += is_whole
        if generation is not None and len(generation.response_ids):
            self.counts["tokens_given_up"] += len(generation.response_ids)
            if self._resumes:
                self.ledger.carry(step + 1, key, generation)

    def _metrics(self) -> Metrics:
        """Returns the cost of over-sampling, and the durations of responses and of their verification."""
        names = ("given_up", "whole_given_up", "tokens_given_up", "carried", "resumed", "restarted")
        metrics: Metrics = {f"rollout/num_{name}": self.counts[name] for name in names}
        if self.seconds:
            for name, share in {"first": 0.0, "half": 0.5, "nine_tenths": 0.9, "last": 1.0}.items():
                metrics[f"time/in_rollout/{name}_response"] = nearest_rank(self.seconds, share)
        # Everything that depends on the load is under time/; all other metrics are the same in each run.
        metrics |= {f"time/verifier/{name}": seconds for name, seconds in self.verification.items()}
        metrics["time/verifier/longest_queue"] = self.longest_queue
        return metrics | self.sampler.verifier.flush_metrics()

    def _notes(self, step: int) -> list[str]:
        num_found = self.counts["found"]
        return [f"step {step}: {num_found} responses of the interrupted run were in the ledger"] if num_found else []


def draw_again(
    groups: Sequence[Group],
    num_correct: int,
    draw_rounds: int,
    seed: str,
    draw: Callable[[Sequence[int], str], list[Group]],
) -> None:
    """Adds samples to the groups with fewer than `num_correct` correct ones, in at most `draw_rounds` rounds.

    The first round has been sampled already. `draw` takes the groups' indices and a seed.
    """
    for draw_round in range(1, draw_rounds):
        missing = [index for index, group in enumerate(groups) if count_correct(group) < num_correct]
        if not missing:
            break
        for index, group in zip(missing, draw(missing, seed_of(seed, "draws", draw_round)), strict=True):
            groups[index].samples += group.samples


def seed_of(seed: str, kind: str, number: int) -> str:
    """Returns the seed of a round; the first round uses the step's own seed."""
    return f"{seed}/{kind}{number}" if number else seed


def count_correct(group: Group) -> int:
    return sum(sample.is_correct for sample in group.samples)
