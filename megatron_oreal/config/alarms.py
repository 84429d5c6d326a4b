"""The thresholds of the alarms, which docs/alarms.md explains one by one. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_oreal.config.effects import Effects, condition
from megatron_oreal.config.section import Section


class MachineAlarms(Section):
    """The alarms about time and memory. A threshold of null switches its alarm off; an alarm changes no number."""

    # A phase of a step counts as slow when it takes so many times the median of its last 50 times.
    slow_phase: float | None = Field(default=3.0, gt=1)
    # A slow phase also takes so many seconds more than that median, so that short phases raise no alarm.
    slow_phase_seconds: float = Field(default=10.0, ge=0)
    # Memory counts as growing when it is by this share above that of the first steps of this start, for ten steps.
    memory_growth: PositiveFloat | None = 0.5

    effects: ClassVar[Effects] = (
        (
            ("slow_phase_seconds",),
            condition(lambda alarms: alarms.slow_phase is not None, "where {at}slow_phase is null: drop it"),
        ),
    )


class AlarmsConfig(MachineAlarms):
    """The alarms. A threshold of null switches its alarm off; an alarm changes no number of the training."""

    # The alarms about samples compare the mean over so many steps; an alarm ends after as many steps without its cause.
    window_steps: PositiveInt = 5
    # The mean difference of the engine's and the trainer's log-probs, in nats a token, that is too large in any step.
    mismatch: PositiveFloat | None = 0.05
    # The entropy of the policy has collapsed below this share of what it was over its first window.
    entropy_share: float | None = Field(default=0.1, gt=0, lt=1)
    groups_solved: float | None = Field(default=0.9, gt=0, le=1)  # The share of all-correct groups that is too large.
    # The share of groups without a correct sample that is too large.
    groups_unsolved: float | None = Field(default=0.9, gt=0, le=1)
    length_limit: float | None = Field(default=0.2, gt=0, le=1)  # The share of cut responses that is too large.
    # The share of samples without a verdict (timeouts, crashes, a failed judge or reward) that is too large.
    verifier_timeouts: float | None = Field(default=0.02, gt=0, le=1)
    staleness: PositiveFloat | None = 4.0  # The mean age of the samples, in steps, that is too large.
