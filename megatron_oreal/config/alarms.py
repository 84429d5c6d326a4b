"""Defines the thresholds of the alarms, which docs/alarms.md explains one by one. Imports no torch."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, PositiveFloat, PositiveInt

from megatron_oreal.config.effects import Effects, condition
from megatron_oreal.config.section import Section


class MachineAlarms(Section):
    """The settings of the alarms about time and memory. A threshold of null turns its alarm off."""

    # A phase of a step counts as slow when it takes this many times the median of its last 50 durations.
    slow_phase: float | None = Field(default=3.0, gt=1)
    # A slow phase must also exceed that median by this many seconds, so that short phases raise no alarm.
    slow_phase_seconds: float = Field(default=10.0, ge=0)
    # Memory counts as growing when it exceeds its level in the first steps after this start by this share, for ten
    # steps.
    memory_growth: PositiveFloat | None = 0.5

    effects: ClassVar[Effects] = (
        (
            ("slow_phase_seconds",),
            condition(lambda alarms: alarms.slow_phase is not None, "where {at}slow_phase is null: drop it"),
        ),
    )


class AlarmsConfig(MachineAlarms):
    """The settings of all alarms. A threshold of null turns its alarm off; no alarm changes a number of training."""

    # The alarms about samples compare the mean over this many steps. An alarm ends after the same number of steps
    # without its cause.
    window_steps: PositiveInt = 5
    # An alarm fires when the mean difference of the engine's and the trainer's log-probs, in nats per token, exceeds
    # this in any step.
    mismatch: PositiveFloat | None = 0.05
    # An alarm fires when the policy's entropy falls below this share of its mean over the first window.
    entropy_share: float | None = Field(default=0.1, gt=0, lt=1)
    # An alarm fires above this share of groups that are all correct.
    groups_solved: float | None = Field(default=0.9, gt=0, le=1)
    # An alarm fires above this share of groups without a correct sample.
    groups_unsolved: float | None = Field(default=0.9, gt=0, le=1)
    # An alarm fires above this share of responses that were cut.
    length_limit: float | None = Field(default=0.2, gt=0, le=1)
    # An alarm fires above this share of samples without a verdict (timeouts, crashes, a failed judge or reward).
    verifier_timeouts: float | None = Field(default=0.02, gt=0, le=1)
    staleness: PositiveFloat | None = 4.0  # An alarm fires above this mean age of the samples, in steps.
