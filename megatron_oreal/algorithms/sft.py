"""Supervised warm-up: cross entropy of the responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from megatron_oreal.algorithms.losses import cross_entropy
from megatron_oreal.algorithms.model import Metrics, Model
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import TrainingSequence


@dataclass(slots=True)
class Sft:
    plan: PackingPlan
    policy: Model
    policy_updates: int = 1

    def update(self, sequences: Sequence[TrainingSequence], _step: int) -> Metrics:
        batch = pack(sequences, self.plan)
        metrics: Metrics = {"train/num_sequences": batch.num_sequences, "train/num_tokens": batch.num_tokens}
        for _ in range(self.policy_updates):
            metrics |= self.policy.train_step(batch, partial(cross_entropy, batch=batch))
        return metrics
