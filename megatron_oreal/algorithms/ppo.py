"""PPO with a critic, as Open-Reasoner-Zero uses it: outcome reward on the last token, discount = lambda = 1.

Hu et al. 2025, arXiv:2503.24290; Schulman et al. 2017, eq. 7 (clipped surrogate) and 2016 (GAE). The critic is updated
before the policy, on several mini-batches, with advantages and returns from before its update. Advantages are whitened
over all tokens of the step, on all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_oreal.algorithms.advantages import gae
from megatron_oreal.algorithms.losses import (
    KL_KINDS,
    engine_mismatch,
    importance_metrics,
    importance_weights,
    mean_entropy,
)
from megatron_oreal.algorithms.model import Metrics, Model
from megatron_oreal.config import PpoConfig
from megatron_oreal.data.packing import PackingPlan, merge, pack_parts, pad_responses, unpad_responses
from megatron_oreal.types import Batch, Group, LossOutput, Microbatch, TokenOutputs, TrainingSequence


@dataclass(slots=True)
class Ppo:
    config: PpoConfig
    plan: PackingPlan
    seed: int
    policy: Model
    critic: Model
    reference: Model | None  # None where no KL asks for it
    importance_cap: float | None = None  # of the weights of off-policy tokens; None: on-policy, no weights

    def __post_init__(self) -> None:
        pulled = self.config.kl_coef > 0 or self.config.kl_reward_coef > 0
        assert self.reference is not None or not pulled, "a KL to the initial policy needs the reference"

    def update(self, groups: Sequence[Group], step: int) -> Metrics:
        """All updates on these groups: every judged sample is used, also of groups of one kind."""
        sequences = [sequence for group in groups for sequence in judged_sequences(group)]
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
        if self.config.policy_minibatches * self.config.policy_epochs > 1 or self.config.kl_reward_coef > 0:
            self.policy.forward(batch, "old_logprobs")
        for microbatch in batch.microbatches:
            fill_advantages(microbatch, self.config)
        metrics |= self.whiten(batch)
        for _ in range(self.config.critic_epochs):
            for minibatch in grouped(parts, self.config.critic_minibatches):
                metrics |= self.critic.train_step(minibatch, partial(self.value_loss, batch=minibatch))
        if step < self.config.policy_freeze_steps:
            return metrics | self.policy.measure(batch, partial(self.policy_loss, batch=batch))
        for _ in range(self.config.policy_epochs):
            for minibatch in grouped(parts, self.config.policy_minibatches):
                metrics |= self.policy.train_step(minibatch, partial(self.policy_loss, batch=minibatch))
        return metrics

    @property
    def num_parts(self) -> int:
        """The finer of the two divisions; the configuration holds that one divides the other."""
        return max(self.config.critic_minibatches, self.config.policy_minibatches)

    def whiten(self, batch: Batch) -> Metrics:
        """Advantages to mean 0 and variance 1 over the step's tokens; the metrics are those before."""
        chosen = torch.cat([part.advantages.index_select(0, part.trained) for part in batch.microbatches]).double()
        sums = torch.stack([chosen.sum(), chosen.square().sum()])
        total, squares = self.policy.sum_over_data(sums).tolist()
        mean = total / batch.num_tokens
        deviation = max(squares / batch.num_tokens - mean * mean, 0.0) ** 0.5
        if self.config.whiten_advantages:
            for microbatch in batch.microbatches:
                whitened = (microbatch.advantages - mean) / (deviation + 1e-8)
                microbatch.advantages = torch.where(microbatch.loss_mask, whitened, 0.0)
        return {"train/advantage_mean": mean, "train/advantage_std": deviation}

    def policy_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """-min(ratio A, clip(ratio) A), averaged over the mini-batch's tokens; KL and entropy where asked for."""
        logprobs, trained = outputs.values, microbatch.trained
        if microbatch.old_logprobs is None:
            microbatch.old_logprobs = logprobs.detach()
        ratio = (logprobs - microbatch.old_logprobs).exp()
        clipped = ratio.clamp(1.0 - self.config.clip_low, 1.0 + self.config.clip_high)
        advantages = microbatch.advantages
        if self.importance_cap is not None:
            advantages = advantages * importance_weights(microbatch, self.importance_cap)
        gains = torch.minimum(ratio * advantages, clipped * advantages)
        surrogate = gains.index_select(0, trained).sum() / batch.num_tokens
        entropy = mean_entropy(outputs, batch)
        loss = -surrogate - self.config.entropy_coef * entropy
        metrics = {
            "loss_surrogate": -surrogate,
            "entropy": entropy,
            "ratio_max": ratio.max(),
            "clip_share": (ratio != clipped).index_select(0, trained).sum() / batch.num_tokens,
            "kl_old": KL_KINDS["k3"](logprobs, microbatch.old_logprobs).index_select(0, trained).sum()
            / batch.num_tokens,
        }
        if microbatch.reference_logprobs is not None:
            divergences = KL_KINDS[self.config.kl_kind](logprobs, microbatch.reference_logprobs)
            kl = divergences.index_select(0, trained).sum() / batch.num_tokens
            loss = loss + self.config.kl_coef * kl
            metrics["kl"] = kl
        metrics |= {"loss": loss} | engine_mismatch(microbatch, batch)
        if self.importance_cap is not None:
            metrics |= importance_metrics(microbatch, batch, self.importance_cap)
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})

    def value_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Half the squared error of the value; with clipping, the larger of the clipped and the free value's."""
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


def judged_sequences(group: Group) -> list[TrainingSequence]:
    """`advantage` holds the sequence's reward, 1 or 0, until the critic has been asked."""
    return [
        TrainingSequence(
            prompt_ids=sample.prompt_ids,
            response_ids=sample.response_ids,
            advantage=float(sample.is_correct),
            is_correct=sample.is_correct,
            model_logprobs=sample.model_logprobs,
        )
        for sample in group.judged_samples
    ]


def split(sequences: Sequence[TrainingSequence], count: int, rng: random.Random) -> list[list[TrainingSequence]]:
    """`count` shuffled parts of nearly equal numbers of sequences; fewer when there are fewer sequences."""
    order = list(range(len(sequences)))
    if count > 1:
        rng.shuffle(order)
    count = min(count, len(sequences))
    return [[sequences[index] for index in order[part::count]] for part in range(count)]


def grouped(parts: Sequence[Batch], count: int) -> list[Batch]:
    """The parts merged to at most `count` mini-batches."""
    count = min(count, len(parts))
    return [merge(parts[number::count]) for number in range(count)]


def fill_advantages(microbatch: Microbatch, config: PpoConfig) -> None:
    """GAE of each sequence: its reward on the last token, less the KL on each token where asked for."""
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
    """[T], the reward where a sequence's last trained token is, else 0."""
    mask = microbatch.loss_mask
    following = torch.cat([mask[1:], mask.new_zeros(1)])
    return torch.where(mask & ~following, rewards, 0.0)
