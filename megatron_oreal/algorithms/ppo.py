"""PPO with a critic, as Open-Reasoner-Zero uses it: the last token gets the outcome reward; discount = lambda = 1.

The sources are Hu et al. 2025, arXiv:2503.24290, and Schulman et al. 2017, eq. 7 (clipped surrogate), and 2016 (GAE).
The critic is updated before the policy, on several mini-batches, with advantages and returns from before its update.
Advantages are whitened over all tokens of the step, on all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_oreal.algorithms.advantages import gae, whiten
from megatron_oreal.algorithms.losses import PolicyTerms
from megatron_oreal.algorithms.metrics import over_minibatches
from megatron_oreal.algorithms.model import Metrics, Model, ModelSource
from megatron_oreal.algorithms.sample_selection import is_overlong, training_sequence
from megatron_oreal.config import Correction, PpoConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan, merge, pack_parts, pad_responses, unpad_responses
from megatron_oreal.types import Batch, Group, LossOutput, Microbatch, TokenOutputs, TokenStream, TrainingSequence


@dataclass(slots=True)
class Ppo:
    """The algorithm with its models."""

    config: PpoConfig
    plan: PackingPlan
    seed: int
    policy: Model
    critic: Model
    reference: Model | None  # None without a KL.
    correction: Correction | None = None  # For off-policy samples; None corrects nothing.

    def __post_init__(self) -> None:
        pulled = self.config.kl_coef > 0 or self.config.kl_reward_coef > 0
        assert self.reference is not None or not pulled, "a KL to the initial policy needs the reference"

    @classmethod
    def build(cls, config: PpoConfig, run: TrainConfig, models: ModelSource) -> Ppo:
        """Builds PPO with the models that its configuration asks for."""
        policy_steps = max(1, run.num_steps - config.policy_freeze_steps)
        policy = models.policy(policy_steps * config.policy_epochs * config.policy_minibatches)
        critic_updates = run.num_steps * config.critic_epochs * config.critic_minibatches
        critic = models.scalar("critic", config.critic, critic_updates, config.critic.head_init)
        return cls(
            config=config,
            plan=models.plan,
            seed=run.seed,
            policy=policy,
            critic=critic,
            reference=models.reference() if config.uses_reference else None,
            correction=run.correction,
        )

    def update(self, groups: Sequence[Group], step: int) -> Metrics:
        """Takes all updates on these groups; it uses every judged sample, also those of groups that are not mixed."""
        sequences = [sequence for group in groups for sequence in judged_sequences(group, self.config)]
        if not sequences:
            return {"train/skipped": 1.0}
        parts = pack_parts(split(sequences, self.num_parts, random.Random(f"{self.seed}-{step}")), self.plan)
        batch = merge(parts)
        metrics = {
            "train/skipped": 0.0,
            "train/num_sequences": batch.num_sequences,
            "train/num_tokens": batch.num_tokens,
        }
        self.critic.forward(batch, "values")
        if self.reference is not None:
            self.reference.forward(batch, "reference_logprobs")
        needs_old_logprobs = self.needs_old_logprobs
        if needs_old_logprobs:
            self.policy.forward(batch, "old_logprobs")
        keep: TokenStream | None = None if needs_old_logprobs else "old_logprobs"
        for microbatch in batch.microbatches:
            fill_advantages(microbatch, self.config)
        metrics |= whiten(batch, self.policy.sum_over_data, changes=self.config.whiten_advantages)
        for _ in range(self.config.critic_epochs):
            minibatches = grouped(parts, self.config.critic_minibatches)
            metrics |= over_minibatches(
                [self.critic.train_step(part, partial(self.value_loss, batch=part)) for part in minibatches]
            )
        if step < self.config.policy_freeze_steps:
            return metrics | self.policy.measure(batch, partial(self.policy_loss, batch=batch), keep)
        for _ in range(self.config.policy_epochs):
            minibatches = grouped(parts, self.config.policy_minibatches)
            metrics |= over_minibatches(
                [self.policy.train_step(part, partial(self.policy_loss, batch=part), keep) for part in minibatches]
            )
            keep = None  # The first pass over each part has kept the old log-probs.
        return metrics

    def planned_updates(self, step: int) -> dict[str, int]:
        return {
            "critic": self.config.critic_epochs * self.config.critic_minibatches,
            "policy": 0 if step < self.config.policy_freeze_steps else self.num_policy_updates,
        }

    @property
    def needs_old_logprobs(self) -> bool:
        """Returns whether a separate pass computes the old log-probs; later mini-batches or the rewards need it.

        Otherwise the first pass over each part keeps them. Ratios to the engine need only the engine's log-probs.
        """
        is_trainers = self.correction is None or self.correction.old_logprobs == "trainer"
        return (self.num_policy_updates > 1 and is_trainers) or self.config.kl_reward_coef > 0

    @property
    def num_policy_updates(self) -> int:
        """Returns the number of the policy's optimizer steps on one set of groups."""
        return self.config.policy_minibatches * self.config.policy_epochs

    @property
    def num_parts(self) -> int:
        """Returns the larger of both numbers of mini-batches; the configuration checks that one divides the other."""
        return max(self.config.critic_minibatches, self.config.policy_minibatches)

    def policy_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Returns -min(ratio A, clip(ratio) A), averaged over tokens, plus the configured KL and entropy terms."""
        terms = PolicyTerms(outputs, microbatch, batch, self.correction)
        ratio = terms.ratio
        clipped = ratio.clamp(1.0 - self.config.clip_low, 1.0 + self.config.clip_high)
        advantages = terms.corrected(microbatch.advantages)
        surrogate = terms.mean(torch.minimum(ratio * advantages, clipped * advantages))
        entropy = terms.entropy()
        loss = -surrogate - self.config.entropy_coef * entropy
        metrics = {
            "loss_surrogate": -surrogate,
            "entropy": entropy,
            "ratio_max": ratio.max(),
            "clip_share": terms.mean(ratio != clipped),
            "kl_old": terms.kl("k3", terms.old_logprobs),
        }
        if microbatch.reference_logprobs is not None:
            metrics["kl"] = kl = terms.kl(self.config.kl_kind, microbatch.reference_logprobs)
            loss = loss + self.config.kl_coef * kl
        return terms.output(loss, metrics)

    def value_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Returns half the squared error of the value; with clipping, the larger of clipped and unclipped error."""
        values, old_values, returns, trained = outputs.values, microbatch.values, microbatch.returns, microbatch.trained
        assert old_values is not None and returns is not None
        errors = (values - returns).square()
        if self.config.value_clip is not None:
            near = old_values + (values - old_values).clamp(-self.config.value_clip, self.config.value_clip)
            errors = torch.maximum(errors, (near - returns).square())
        loss = 0.5 * errors.index_select(0, trained).sum() / batch.num_tokens
        metrics = {
            "loss": loss.detach(),
            "value_mean": values.detach().index_select(0, trained).sum() / batch.num_tokens,
            "return_mean": returns.index_select(0, trained).sum() / batch.num_tokens,
            "error": (values.detach() - returns).square().index_select(0, trained).sum() / batch.num_tokens,
        }
        return LossOutput(loss, metrics)


def judged_sequences(group: Group, config: PpoConfig) -> list[TrainingSequence]:
    """Returns the group's sequences; `advantage` holds the reward until the critic's values are known."""
    samples = [sample for sample in group.judged_samples if not (config.filter_overlong and is_overlong(sample))]
    return [training_sequence(sample, sample.reward) for sample in samples]


def split(sequences: Sequence[TrainingSequence], count: int, rng: random.Random) -> list[list[TrainingSequence]]:
    """Returns `count` shuffled parts of nearly equal size, or fewer if there are fewer sequences."""
    order = list(range(len(sequences)))
    if count > 1:
        rng.shuffle(order)
    count = min(count, len(sequences))
    return [[sequences[index] for index in order[part::count]] for part in range(count)]


def grouped(parts: Sequence[Batch], count: int) -> list[Batch]:
    """Merges the parts into at most `count` mini-batches."""
    count = min(count, len(parts))
    return [merge(parts[number::count]) for number in range(count)]


def fill_advantages(microbatch: Microbatch, config: PpoConfig) -> None:
    """Fills the GAE of each sequence. The reward is on the last token; each token loses its KL if configured."""
    assert microbatch.values is not None
    values, mask = pad_responses(microbatch.values, microbatch)
    token_rewards = last_token_rewards(microbatch.advantages, microbatch)
    if config.kl_reward_coef > 0:
        assert microbatch.old_logprobs is not None and microbatch.reference_logprobs is not None
        token_rewards = token_rewards - config.kl_reward_coef * (
            microbatch.old_logprobs - microbatch.reference_logprobs
        )
    rewards, _ = pad_responses(token_rewards, microbatch)
    advantages, returns = gae(rewards, values, mask, config.discount, config.gae_lambda)
    microbatch.advantages = unpad_responses(advantages, microbatch)
    microbatch.returns = unpad_responses(returns, microbatch)


def last_token_rewards(rewards: Tensor, microbatch: Microbatch) -> Tensor:
    """Returns the reward at each sequence's last trained token and 0 elsewhere: [T]."""
    mask = microbatch.loss_mask
    following = torch.cat([mask[1:], mask.new_zeros(1)])
    return torch.where(mask & ~following, rewards, 0.0)
