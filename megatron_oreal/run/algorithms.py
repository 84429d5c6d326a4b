"""Which models an algorithm needs, and the algorithm on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_oreal.algorithms.model import Metrics
from megatron_oreal.algorithms.oreal import Oreal
from megatron_oreal.algorithms.outcome import Outcome
from megatron_oreal.algorithms.ppo import Ppo
from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.config import (
    OrealConfig,
    OutcomeConfig,
    PpoConfig,
    RunConfig,
    SftConfig,
    TrainableConfig,
    TrainConfig,
)
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.models.fp8_layers import fp8_token_multiple
from megatron_oreal.models.heads import Head, LogprobHead, ScalarHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Group
from megatron_oreal.weights.families import Architecture, read_architecture


class GroupAlgorithm(Protocol):
    def update(self, groups: list[Group], step: int) -> Metrics: ...


@dataclass(slots=True)
class ModelBuilder:
    """Builds a run's models, with weights from a Hugging Face directory."""

    config: RunConfig
    layout: ParallelLayout
    architecture: Architecture

    def policy(self, training: TrainableConfig, num_updates: int) -> TrainableModel:
        return self._build("policy", self.logprob_head, self.config.model.path, training, num_updates)

    def reference(self) -> TrainableModel:
        """The frozen initial policy."""
        return self._build("reference", self.logprob_head, self.config.model.path)

    def scalar(
        self, name: str, head: ScalarHead, path: Path | None, training: TrainableConfig, num_updates: int
    ) -> TrainableModel:
        return self._build(name, head, path or self.config.model.path, training, num_updates)

    @property
    def importance_cap(self) -> float | None:
        """Where samples may be older than the policy."""
        assert isinstance(self.config, TrainConfig)
        rollout = self.config.rollout
        return rollout.importance_cap if rollout.staleness > 0 or rollout.unfinished == "resume" else None

    @property
    def logprob_head(self) -> LogprobHead:
        model = self.config.model
        vocab_size = self.architecture.vocab_size
        return LogprobHead(self.layout, vocab_size, precision=model.head_precision, fp8=model.head_fp8)

    @property
    def plan(self) -> PackingPlan:
        interleaved, recipe = self.layout.virtual_size > 1, self.config.model.fp8
        token_multiple = self.layout.tensor_size if self.layout.sequence_parallel else 1
        return PackingPlan(
            data_rank=self.layout.data_rank,
            data_size=self.layout.data_size,
            microbatch_tokens=self.config.parallel.microbatch_tokens,
            token_multiple=token_multiple if recipe is None else fp8_token_multiple(recipe, self.layout),
            count_multiple=self.layout.pipeline_size if interleaved else 1,
            equal_lengths=interleaved,
            device=self.layout.device,
        )

    def _build(
        self, name: str, head: Head, path: Path, training: TrainableConfig | None = None, num_updates: int = 1
    ) -> TrainableModel:
        model = TrainableModel(name, self.architecture, head, self.config.model, self.layout, training, num_updates)
        model.load_weights(path)
        return model


def build_algorithm(config: TrainConfig, layout: ParallelLayout) -> tuple[GroupAlgorithm, dict[str, TrainableModel]]:
    """The algorithm and all its models by name, also the frozen ones; "policy" is one of them."""
    builder = ModelBuilder(config, layout, read_architecture(config.model.path))
    return RECIPES[config.algorithm.name](config, builder)


def build_sft(config: SftConfig, layout: ParallelLayout) -> tuple[Sft, dict[str, TrainableModel]]:
    builder = ModelBuilder(config, layout, read_architecture(config.model.path))
    policy = builder.policy(config.policy, config.num_steps * config.policy.updates_per_step)
    return Sft(builder.plan, policy, config.policy.updates_per_step), {"policy": policy}


def oreal(config: TrainConfig, builder: ModelBuilder) -> tuple[GroupAlgorithm, dict[str, TrainableModel]]:
    algorithm, reward = config.algorithm, config.reward_model
    assert isinstance(algorithm, OrealConfig)
    frozen_steps = algorithm.policy_freeze_steps if reward.enabled else 0
    policy_steps = max(1, config.num_steps - frozen_steps)
    policy = builder.policy(config.policy, policy_steps * config.policy.updates_per_step)
    models = {"policy": policy}
    if reward.enabled:
        num_updates = config.num_steps * reward.updates_per_step
        models["reward_model"] = builder.scalar(
            "reward_model", ScalarHead(builder.layout), reward.path, reward, num_updates
        )
    if algorithm.kl_coef > 0 and algorithm.kl_target == "initial":
        models["reference"] = builder.reference()
    oreal = Oreal(
        config=algorithm,
        plan=builder.plan,
        seed=config.seed,
        policy=policy,
        reference=models.get("reference"),
        reward_model=models.get("reward_model"),
        policy_updates=config.policy.updates_per_step,
        reward_model_updates=reward.updates_per_step,
        importance_cap=builder.importance_cap,
    )
    return oreal, models


def ppo(config: TrainConfig, builder: ModelBuilder) -> tuple[GroupAlgorithm, dict[str, TrainableModel]]:
    algorithm, critic_config = config.algorithm, config.critic
    assert isinstance(algorithm, PpoConfig)
    policy_steps = max(1, config.num_steps - algorithm.policy_freeze_steps)
    policy = builder.policy(config.policy, policy_steps * algorithm.policy_epochs * algorithm.policy_minibatches)
    critic_updates = config.num_steps * algorithm.critic_epochs * algorithm.critic_minibatches
    head = ScalarHead(builder.layout, critic_config.head_init, config.seed)
    critic = builder.scalar("critic", head, critic_config.path, critic_config, critic_updates)
    models = {"policy": policy, "critic": critic}
    if algorithm.kl_coef > 0 or algorithm.kl_reward_coef > 0:
        models["reference"] = builder.reference()
    ppo = Ppo(
        config=algorithm,
        plan=builder.plan,
        seed=config.seed,
        policy=policy,
        critic=critic,
        reference=models.get("reference"),
        importance_cap=builder.importance_cap,
    )
    return ppo, models


def outcome(config: TrainConfig, builder: ModelBuilder) -> tuple[GroupAlgorithm, dict[str, TrainableModel]]:
    algorithm = config.algorithm
    assert isinstance(algorithm, OutcomeConfig)
    policy = builder.policy(config.policy, config.num_steps * config.policy.updates_per_step)
    models = {"policy": policy}
    if algorithm.kl_coef > 0:
        models["reference"] = builder.reference()
    outcome = Outcome(
        config=algorithm,
        plan=builder.plan,
        group_size=config.rollout.group_size,
        policy=policy,
        reference=models.get("reference"),
        policy_updates=config.policy.updates_per_step,
        importance_cap=builder.importance_cap,
    )
    return outcome, models


RECIPES: dict[str, Callable[[TrainConfig, ModelBuilder], tuple[GroupAlgorithm, dict[str, TrainableModel]]]] = {
    "oreal": oreal,
    "outcome": outcome,
    "ppo": ppo,
}
