"""Runs OREAL's three models on a batch of several micro-batches, to test the parts of an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_oreal.algorithms.oreal import Oreal, fill_coefficients
from megatron_oreal.config import Correction, ModelConfig, OrealConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models.heads import LogprobHead, ScalarHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import LossOutput, Microbatch, TokenOutputs
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences


def passes_over_microbatches(
    path: Path, layout: ParallelLayout, settings: ModelConfig
) -> dict[str, Callable[[], object]]:
    """Returns functions for the forward passes and gradients of an update. Call them in order, any number of times.

    Each runs only Megatron's schedule, over five micro-batches or more, except "coefficients", which runs OREAL's
    computation between two of them.
    """
    architecture = read_architecture(path)
    policy_head = LogprobHead(layout, architecture.vocab_size)

    def build(name: str, head: LogprobHead | ScalarHead, training: TrainableConfig | None) -> TrainableModel:
        model = TrainableModel(name, architecture, head, settings, layout, training)
        model.load_weights(path)
        return model

    reward_model = build("reward_model", ScalarHead(layout), TrainableConfig())
    policy, reference = build("policy", policy_head, TrainableConfig()), build("reference", policy_head, None)
    plan = PackingPlan(data_rank=0, data_size=1, microbatch_tokens=30, device=layout.device)
    oreal = Oreal(OrealConfig(), plan, 0, policy, reference, reward_model, correction=Correction(importance_cap=2.0))
    batch = pack(random_sequences(12), plan)
    assert len(batch.microbatches) >= 5

    def keep_logprobs(outputs: TokenOutputs, microbatch: Microbatch) -> None:
        microbatch.reference_logprobs = outputs.values

    def reward_loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
        return oreal.reward_loss(outputs, microbatch, batch)

    def coefficients() -> None:
        for microbatch in batch.microbatches:
            fill_coefficients(microbatch, batch, oreal.config)

    def policy_loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
        return oreal.policy_loss(outputs, microbatch, batch)

    return {
        "reference": lambda: reference._run(batch, keep_logprobs, forward_only=True),
        "reward_model": lambda: reward_model._run(batch, reward_loss, forward_only=False),
        "coefficients": coefficients,
        "policy": lambda: policy._run(batch, policy_loss, forward_only=False),
    }
