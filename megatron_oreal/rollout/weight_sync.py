"""The policy's weights to the generation engine, after every step."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_oreal.checkpoint.hf import WeightStream
from megatron_oreal.rollout.engine import RolloutEngine


@dataclass(slots=True)
class WeightSync:
    stream: WeightStream  # of the live policy: iterating it again reads the weights as they are then
    engine: RolloutEngine

    def push(self, version: int) -> None:
        self.engine.update_weights(self.stream, version)
