"""Defines the deadlines of a run's phases, which docs/hangs.md explains. Imports no torch."""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from megatron_oreal.config.section import Section


class WatchdogConfig(Section):
    """The deadlines of a run's phases. At a deadline the run writes its ranks' stacks and exits with code 75."""

    enabled: bool = True  # false turns the watchdog off, for example under a debugger.
    factor: float = Field(default=10.0, ge=1)  # A phase may take up to this many times its longest duration so far.
    # The least deadline of the start, which loads models and starts servers. With null the start has no deadline; the
    # same holds for the next settings.
    start_seconds: PositiveFloat | None = 3600
    rollout_seconds: PositiveFloat | None = 7200  # The least deadline of a rollout.
    # The least deadline of an update. Keep it and the next three deadlines below parallel.timeout_seconds.
    update_seconds: PositiveFloat | None = 1500
    weight_sync_seconds: PositiveFloat | None = 1500  # The least deadline of a weight synchronisation.
    checkpoint_seconds: PositiveFloat | None = 1500  # The least deadline of a checkpoint.
    other_seconds: PositiveFloat | None = 1500  # The least deadline of the time between two phases.
    evaluation_seconds: PositiveFloat | None = 7200  # The least deadline of an evaluation.
    end_seconds: PositiveFloat | None = 7200  # The least deadline of the end, which writes report and model.

    def least_seconds(self) -> dict[str, float]:
        """Returns the least deadline of each phase that has one, for example {"rollout": 7200.0}."""
        found = {name.removesuffix("_seconds"): value for name, value in self if name.endswith("_seconds")}
        return {phase: float(value) for phase, value in found.items() if value is not None} if self.enabled else {}
