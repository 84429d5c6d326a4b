"""Builds the algorithm of a run and the models that it needs."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_oreal.algorithms.model import GroupAlgorithm
from megatron_oreal.algorithms.registry import ALGORITHMS
from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.config import HeadInit, ScalarModelConfig, SftConfig, TrainableConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.models.fp8_layers import fp8_token_multiple
from megatron_oreal.models.heads import Head, LogprobHead, ScalarHead, Truncation
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.run.device_defaults import attention_pair_cost
from megatron_oreal.weights.families import Architecture, read_architecture


@dataclass(slots=True)
class ModelBuilder:
    """Builds a run's models, with weights from a Hugging Face directory; it is the ModelSource of the algorithms."""

    config: TrainConfig | SftConfig
    layout: ParallelLayout
    architecture: Architecture
    models: dict[str, TrainableModel] = field(default_factory=dict)  # The models built so far, by name.

    def policy(self, num_updates: int) -> TrainableModel:
        head = self.logprob_head(self.architecture)
        rollout = self.config.rollout
        if isinstance(self.config, TrainConfig) and rollout.trains_truncated:
            head = replace(head, truncation=Truncation(rollout.top_k, rollout.top_p))
        return self._build("policy", head, self.config.model.path, self.config.policy, num_updates)

    def reference(self) -> TrainableModel:
        """Builds the frozen initial policy."""
        return self._build("reference", self.logprob_head(self.architecture), self.config.model.path)

    def teacher(self, path: Path) -> TrainableModel:
        """Builds a frozen teacher, which has the policy's tokens and replaces the reference."""
        architecture = read_architecture(path)
        return self._build("reference", self.logprob_head(architecture), path, architecture=architecture)

    def scalar(
        self, name: str, training: ScalarModelConfig, num_updates: int, head_init: HeadInit = "zero"
    ) -> TrainableModel:
        head = ScalarHead(self.layout, head_init, self.config.seed)
        return self._build(name, head, training.path or self.config.model.path, training, num_updates)

    def logprob_head(self, architecture: Architecture) -> LogprobHead:
        model, vocab_size = self.config.model, architecture.vocab_size
        # Supervised training samples nothing, so its temperature is 1.
        temperature = self.config.rollout.temperature if isinstance(self.config, TrainConfig) else 1.0
        return LogprobHead(
            self.layout,
            vocab_size,
            precision=model.head_precision,
            fp8=model.head_fp8,
            temperature=temperature,
            backend=model.head_backend,
            max_tokens=self.config.parallel.microbatch_tokens,
        )

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
            engine_logprobs=self.config.rollout.engine_logprobs,
            pair_cost=attention_pair_cost(self.architecture),
            context_rank=self.layout.context_rank,
            context_size=self.layout.context_size,
        )

    def _build(
        self,
        name: str,
        head: Head,
        path: Path,
        training: TrainableConfig | None = None,
        num_updates: int = 1,
        architecture: Architecture | None = None,  # the default is the policy's
    ) -> TrainableModel:
        architecture = architecture or self.architecture
        model = TrainableModel(name, architecture, head, self.config.model, self.layout, training, num_updates)
        model.load_weights(path)
        self.models[name] = model
        return model


def build_algorithm(config: TrainConfig, layout: ParallelLayout) -> tuple[GroupAlgorithm, dict[str, TrainableModel]]:
    """Builds the algorithm. Returns it and all its models by name, including the frozen ones and "policy"."""
    builder = ModelBuilder(config, layout, read_architecture(config.model.path))
    entry = ALGORITHMS[config.algorithm.name]
    algorithm = entry.build(config.algorithm, config, builder)
    trained = {name for name, model in builder.models.items() if model.training is not None}
    assert trained <= set(entry.trains), f"the registry does not name {trained - set(entry.trains)}"
    return algorithm, builder.models


def build_sft(config: SftConfig, layout: ParallelLayout) -> tuple[Sft, dict[str, TrainableModel]]:
    """Builds the supervised training and its only model, the policy."""
    builder = ModelBuilder(config, layout, read_architecture(config.model.path))
    policy = builder.policy(config.num_steps * config.policy.updates_per_step)
    return Sft(builder.plan, policy, config.policy.updates_per_step), dict(builder.models)
