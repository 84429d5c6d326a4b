"""Supervised fine-tuning, the warm-up before reinforcement learning: it minimises the responses' cross entropy."""

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
    """Supervised fine-tuning. Its `update` takes sequences; the other algorithms' takes groups."""

    plan: PackingPlan
    policy: Model
    policy_updates: int = 1  # Optimizer steps on one set of sequences.

    def update(self, sequences: Sequence[TrainingSequence], _step: int) -> Metrics:
        """Takes all optimizer steps on these sequences."""
        batch = pack(sequences, self.plan)
        metrics: Metrics = {"train/num_sequences": batch.num_sequences, "train/num_tokens": batch.num_tokens}
        for _ in range(self.policy_updates):
            metrics |= self.policy.train_step(batch, partial(cross_entropy, batch=batch))
        return metrics

    def planned_updates(self, _step: int) -> dict[str, int]:
        return {"policy": self.policy_updates}
