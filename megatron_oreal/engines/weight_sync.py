"""Sends the policy's weights to the generation engine after every step."""

from __future__ import annotations

import time
from dataclasses import dataclass

from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.weights.fingerprint import MeasuredStream
from megatron_oreal.weights.stream import WeightStream


@dataclass(slots=True, frozen=True)
class PushReport:
    num_bytes: int  # of the whole model, counted once for any number of servers
    seconds: float

    def metrics(self) -> dict[str, float]:
        return {"time/weight_sync_gb_per_second": self.num_bytes / 1e9 / max(self.seconds, 1e-9)}


@dataclass(slots=True)
class WeightSync:
    stream: WeightStream  # of the live policy; each pass reads the current weights
    engine: RolloutEngine
    has_fingerprint: bool = False  # whether a push also computes the fingerprint, which the response ledger needs
    fingerprint: str = ""  # of the last pushed weights

    def push(self, version: int) -> PushReport:
        """Collective. The engine then generates with these weights, and names them `version`."""
        begin = time.monotonic()
        measured = MeasuredStream(self.stream, self.has_fingerprint)
        self.engine.update_weights(measured, version)
        if self.has_fingerprint:
            self.fingerprint = measured.fingerprint
        return PushReport(measured.num_bytes, time.monotonic() - begin)
