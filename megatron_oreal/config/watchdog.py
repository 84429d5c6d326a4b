"""The deadlines of a run's phases, which docs/hangs.md explains. Imports no torch."""

from __future__ import annotations

from pydantic import Field, PositiveFloat

from megatron_oreal.config.section import Section


class WatchdogConfig(Section):
    """When a phase counts as hanging: the run then writes what its ranks do, and ends with exit code 75.

    The deadline of a phase is its setting here, or `factor` times the longest such phase of this start if that is more.
    """

    enabled: bool = True  # false lets a run hang, for example under a debugger.
    factor: float = Field(default=10.0, ge=1)  # A phase may take so many times the longest one of its kind so far.
    # The least deadline of the start, when models are loaded and servers start; null: it has none, as below.
    start_seconds: PositiveFloat | None = 3600
    rollout_seconds: PositiveFloat | None = 7200  # The least deadline of a rollout.
    # The least deadline of an update; it should be below parallel.timeout_seconds, as the next three should.
    update_seconds: PositiveFloat | None = 1500
    weight_sync_seconds: PositiveFloat | None = 1500  # The least deadline of a synchronisation of weights.
    checkpoint_seconds: PositiveFloat | None = 1500  # The least deadline of a checkpoint.
    other_seconds: PositiveFloat | None = 1500  # The least deadline of what lies between two phases.
    evaluation_seconds: PositiveFloat | None = 7200  # The least deadline of an evaluation.
    end_seconds: PositiveFloat | None = 7200  # The least deadline of the end, when report and model are written.

    def least_seconds(self) -> dict[str, float]:
        """Returns the least deadline of each phase that has one, for example {"rollout": 7200.0}."""
        found = {name.removesuffix("_seconds"): value for name, value in self if name.endswith("_seconds")}
        return {phase: float(value) for phase, value in found.items() if value is not None} if self.enabled else {}
