"""Decides from the records of a run when an alarm fires and when it ends. It takes records and returns events.

An alarm that has fired stays silent until it has ended, so that a lasting state is reported once. The events depend
only on the records and the thresholds; a resumed run replays its records and continues like an uninterrupted one.
docs/alarms.md has a paragraph about each alarm.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from megatron_oreal.config import AlarmsConfig, MachineAlarms
from megatron_oreal.types import Metrics

PAGE = "docs/alarms.md"
PHASES = ("rollout", "update", "weight_sync", "evaluation", "checkpoint")
# Durations of a phase: the number kept, and the number needed before one counts as slow
PHASE_HISTORY, MIN_PHASE_HISTORY = 50, 5
MEMORY_STEPS, MEMORY_WARMUP_STEPS = 10, 2  # steps that are compared, and steps before the first of them
QUIET_STEPS = 5  # steps without the cause, after which an alarm about time or memory ends
ENTROPY, MISMATCH = "policy/entropy", "policy/mismatch"


class Finding(NamedTuple):
    """The measurement of a check at one step."""

    value: float
    threshold: float  # for comparison with the value
    is_bad: bool


class Check(Protocol):
    def __call__(self, record: Metrics) -> Finding | None:
        """Takes the next record; returns None if the record lacks what the check needs."""


@dataclass(slots=True, frozen=True)
class AlarmEvent:
    """A line of alarms.jsonl."""

    step: int
    alarm: str  # "length_limit": its threshold is the setting alarms.length_limit
    subject: str  # the phase or the kind of memory; empty if there is only one
    event: Literal["fired", "ended"]
    metric: str  # the metric whose chart shows a mark
    value: float
    threshold: float
    line: str  # for the log


@dataclass(slots=True)
class Alarm:
    """One alarm about one metric, with its state."""

    name: str
    metric: str
    check: Check
    words: Callable[[float], str]  # describes the value in a sentence
    advice: str
    quiet_steps: int
    subject: str = ""
    of_process: bool = False  # its measurement begins again with each start of the run
    is_on: bool = False
    num_quiet: int = 0  # steps since the cause was last present

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.subject

    @property
    def title(self) -> str:
        return f"{self.name} ({self.subject})" if self.subject else self.name

    def observe(self, record: Metrics) -> AlarmEvent | None:
        """Takes the record of the next step; returns an event if the alarm fires or ends."""
        found = self.check(record)
        if found is None:
            return None
        self.num_quiet = 0 if found.is_bad else self.num_quiet + 1
        step, title = int(record["step"]), self.title
        if found.is_bad and not self.is_on:
            self.is_on = True
            line = (
                f"step {step}: alarm {title}: {self.words(found.value)} (alarms.{self.name} allows "
                f"{found.threshold:.4g}): {self.advice}; see {PAGE}"
            )
            return self._event(step, "fired", found, line)
        if self.is_on and self.num_quiet >= self.quiet_steps:
            self.is_on = False
            return self._event(step, "ended", found, f"step {step}: alarm {title} has ended: {self.words(found.value)}")
        return None

    def _event(self, step: int, event: Literal["fired", "ended"], found: Finding, line: str) -> AlarmEvent:
        return AlarmEvent(step, self.name, self.subject, event, self.metric, found.value, found.threshold, line)


class Alarms:
    """All alarms that the configuration enables."""

    def __init__(self, config: MachineAlarms) -> None:
        self.alarms = [*sample_alarms(config), *machine_alarms(config)]

    def observe(self, record: Metrics) -> list[AlarmEvent]:
        """Takes the record of the next step, with its key "step"; values are numbers."""
        return [event for alarm in self.alarms if (event := alarm.observe(record)) is not None]

    def replay(self, records: Iterable[Metrics], events: Sequence[AlarmEvent]) -> None:
        """Replays the steps before a resume: their records and their events."""
        for record in records:
            for alarm in self.alarms:
                if not alarm.of_process:
                    alarm.observe(record)
        told = {(event.alarm, event.subject): event.event == "fired" for event in events}
        for alarm in self.alarms:
            alarm.is_on = not alarm.of_process and told.get(alarm.key, False)

    @property
    def lasting(self) -> list[str]:
        """Returns the names of the alarms that are on."""
        return [alarm.title for alarm in self.alarms if alarm.is_on]


@dataclass(slots=True)
class MeanTooLarge:
    """Checks whether the mean over the last `num_steps` values reaches a threshold."""

    value_of: Callable[[Metrics], float | None]
    threshold: float
    num_steps: int
    values: deque[float] = field(default_factory=deque)

    def __call__(self, record: Metrics) -> Finding | None:
        mean = mean_of_window(self.values, self.value_of(record), self.num_steps)
        return None if mean is None else Finding(mean, self.threshold, mean >= self.threshold)


@dataclass(slots=True)
class FallenBelowShare:
    """Checks whether the mean over the last `num_steps` values is below a share of the mean over the first ones."""

    metric: str
    share: float
    num_steps: int
    values: deque[float] = field(default_factory=deque)
    first: float | None = None

    def __call__(self, record: Metrics) -> Finding | None:
        mean = mean_of_window(self.values, finite(record, self.metric), self.num_steps)
        if mean is None:
            return None
        if self.first is None:
            self.first = mean
        threshold = self.share * self.first
        return Finding(mean, threshold, mean < threshold)


@dataclass(slots=True)
class SlowerThanBefore:
    """Checks whether a phase takes much longer than the median of its last durations."""

    metric: str
    factor: float
    min_extra_seconds: float
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=PHASE_HISTORY))

    def __call__(self, record: Metrics) -> Finding | None:
        now = finite(record, self.metric)
        if now is None:
            return None
        usual = statistics.median(self.seconds) if len(self.seconds) >= MIN_PHASE_HISTORY else math.inf
        self.seconds.append(now)
        threshold = max(self.factor * usual, usual + self.min_extra_seconds)
        return None if math.isinf(usual) else Finding(now, threshold, now > threshold)


@dataclass(slots=True)
class Growing:
    """Checks whether the smallest of the last values exceeds the largest of the first ones of this start by a share."""

    metric: str
    share: float
    num_before: int = 0
    first: list[float] = field(default_factory=list)
    last: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY_STEPS))

    def __call__(self, record: Metrics) -> Finding | None:
        now = finite(record, self.metric)
        if now is None:
            return None
        self.num_before += 1
        if self.num_before <= MEMORY_WARMUP_STEPS:
            return None
        if len(self.first) < MEMORY_STEPS:
            self.first.append(now)
            return None
        self.last.append(now)
        if len(self.last) < MEMORY_STEPS:
            return None
        threshold = (1 + self.share) * max(self.first)
        return Finding(min(self.last), threshold, min(self.last) > threshold)


def mean_of_window(values: deque[float], value: float | None, num_steps: int) -> float | None:
    """Adds the value; returns the mean of the last `num_steps` values, or None while there are fewer."""
    if value is None:
        return None
    values.append(value)
    if len(values) > num_steps:
        values.popleft()
    return sum(values) / num_steps if len(values) == num_steps else None


def finite(record: Metrics, metric: str) -> float | None:
    value = record.get(metric)
    return value if value is not None and math.isfinite(value) else None


def share_of_groups(record: Metrics, kind: str) -> float | None:
    """Returns the share of judged groups of one kind: all_correct or all_incorrect."""
    counts = {name: record.get(f"reward/groups_{name}", 0.0) for name in ("mixed", "all_correct", "all_incorrect")}
    num_judged = sum(counts.values())
    return counts[kind] / num_judged if num_judged else None


def unjudged_share(record: Metrics) -> float | None:
    """Returns the share of samples without a verdict."""
    num_samples = finite(record, "rollout/num_samples")
    kinds = ("timeout", "crash", "judge_failed", "reward_failed")
    return sum(record.get(f"verifier/{kind}", 0.0) for kind in kinds) / num_samples if num_samples else None


def sample_alarms(config: MachineAlarms) -> list[Alarm]:
    """Makes the alarms about samples and the policy, which only training on outcome rewards has."""
    if not isinstance(config, AlarmsConfig):
        return []
    steps = config.window_steps
    # The setting, its threshold, the metric, its check, the value in words, and the advice
    rows: list[tuple[str, float | None, str, Callable[[Metrics], float | None], str, str]] = [
        (
            "groups_solved",
            config.groups_solved,
            "reward/groups_all_correct",
            lambda record: share_of_groups(record, "all_correct"),
            "{:.0%} of the groups are all correct and teach nothing",
            "take harder prompts, or leave out solved ones with data.repeats_by_pass_rate",
        ),
        (
            "groups_unsolved",
            config.groups_unsolved,
            "reward/groups_all_incorrect",
            lambda record: share_of_groups(record, "all_incorrect"),
            "{:.0%} of the groups have no correct sample and teach nothing",
            "read samples with `megatron-oreal view`, then take easier prompts or warm up with sft",
        ),
        (
            "length_limit",
            config.length_limit,
            "rollout/length_limit_share",
            lambda record: finite(record, "rollout/length_limit_share"),
            "{:.0%} of the responses were cut at the length limit",
            "raise rollout.max_new_tokens, or see why responses do not end",
        ),
        (
            "verifier_timeouts",
            config.verifier_timeouts,
            "verifier/timeout",
            unjudged_share,
            "{:.1%} of the samples have no verdict",
            "look at verifier/* in metrics.jsonl, then at verifier.cpu_seconds, the judge or the reward server",
        ),
        (
            "staleness",
            config.staleness,
            "rollout/staleness_mean",
            lambda record: finite(record, "rollout/staleness_mean"),
            "the samples are {:.1f} steps old on average",
            "lower rollout.staleness, or give generation more servers",
        ),
    ]
    alarms = [
        Alarm(name, metric, MeanTooLarge(value_of, threshold, steps), words.format, advice, steps)
        for name, threshold, metric, value_of, words, advice in rows
        if threshold is not None
    ]
    if config.mismatch is not None:
        check: Check = MeanTooLarge(lambda record: finite(record, MISMATCH), config.mismatch, 1)
        words = "engine and trainer disagree by {:.3g} nats a token on average".format
        advice = "compare dtypes and kernels, or lower rollout.staleness"
        alarms.append(Alarm("mismatch", MISMATCH, check, words, advice, steps))
    if config.entropy_share is not None:
        check = FallenBelowShare(ENTROPY, config.entropy_share, steps)
        words = "the policy's entropy has fallen to {:.3g} nats a token".format
        advice = "raise algorithm.clip_high or algorithm.entropy_coef, or lower policy.optimizer.lr"
        alarms.append(Alarm("entropy_share", ENTROPY, check, words, advice, steps))
    return alarms


def machine_alarms(config: MachineAlarms) -> list[Alarm]:
    """Makes the alarms about time and memory."""
    alarms = []
    if config.slow_phase is not None:
        for phase in PHASES:
            metric = f"time/{phase}_seconds"
            check: Check = SlowerThanBefore(metric, config.slow_phase, config.slow_phase_seconds)
            advice = "compare response lengths, servers, disks and other jobs with the steps before"
            alarms.append(
                Alarm("slow_phase", metric, check, "the phase took {:.1f} s".format, advice, QUIET_STEPS, phase)
            )
    if config.memory_growth is not None:
        for memory in ("host", "gpu"):
            metric = f"time/memory/{memory}_gib"
            check = Growing(metric, config.memory_growth)
            words = "a rank's memory has grown to {:.2f} GiB".format
            advice = "find what is kept before the memory is full; a resume frees it"
            alarms.append(Alarm("memory_growth", metric, check, words, advice, QUIET_STEPS, memory, of_process=True))
    return alarms
