"""OREAL: it clones correct samples, makes incorrect ones less likely, and weighs tokens by a learned reward model.

The source is Lyu et al. 2025, arXiv:2502.06781: algorithm 1, eq. 10 (token weights), 11 (policy loss) and 12 (reward
model loss). The presets "paper" and "reference" (the published code) differ in the choices that OrealConfig lists, and
each choice can be set on its own.

The published code divides the three terms of its loss by the numbers of correct, incorrect and all tokens. Eq. 11 sums
over tokens and averages over sequences: it divides all terms by the number of sequences (`denominators: sequences`), so
that long incorrect answers weigh more. Both presets use the published code's denominators. All counts are over all
ranks. With one update a step the ratio to the old policy is 1, and only the ratio's gradient matters.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_oreal.algorithms.advantages import ADVANTAGES
from megatron_oreal.algorithms.losses import PolicyTerms, outcome_cross_entropy
from megatron_oreal.algorithms.model import Metrics, Model, ModelSource
from megatron_oreal.algorithms.sample_selection import is_mixed, is_overlong, training_sequence
from megatron_oreal.config import Correction, OrealConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan, pack, pad_responses, unpad_responses
from megatron_oreal.types import Batch, Group, LossOutput, Microbatch, Sample, TokenOutputs, TrainingSequence


@dataclass(slots=True)
class Oreal:
    """The algorithm with its models; `update` is algorithm 1 of the paper after the rollout."""

    config: OrealConfig
    plan: PackingPlan
    seed: int
    policy: Model
    reference: Model | None  # None without a KL to the initial policy.
    reward_model: Model | None  # None: every token weight is 1.
    policy_updates: int = 1  # Optimizer steps on one set of groups.
    reward_model_updates: int = 1
    correction: Correction | None = None  # For off-policy samples; None corrects nothing.

    def __post_init__(self) -> None:
        pulled = self.config.kl_coef > 0 and self.config.kl_target == "initial"
        assert self.reference is not None or not pulled, "a KL to the initial policy needs the reference"

    @classmethod
    def build(cls, config: OrealConfig, run: TrainConfig, models: ModelSource) -> Oreal:
        """Builds OREAL with the models that its configuration asks for."""
        learns_scores = config.reward_model.enabled
        frozen_steps = config.policy_freeze_steps * (learns_scores and not config.freeze_advances_schedule)
        policy_steps = max(1, run.num_steps - frozen_steps)
        policy = models.policy(policy_steps * run.policy.updates_per_step)
        reward_model = None
        if learns_scores:
            num_updates = run.num_steps * config.reward_model.updates_per_step
            reward_model = models.scalar("reward_model", config.reward_model, num_updates)
        return cls(
            config=config,
            plan=models.plan,
            seed=run.seed,
            policy=policy,
            reference=models.reference() if config.uses_reference else None,
            reward_model=reward_model,
            policy_updates=run.policy.updates_per_step,
            reward_model_updates=config.reward_model.updates_per_step,
            correction=run.correction,
        )

    def update(self, groups: Sequence[Group], step: int) -> Metrics:
        """Takes all optimizer steps on these groups; without a mixed group it returns {"train/skipped": 1.0}."""
        sequences = select_sequences(groups, self.config, random.Random(f"{self.seed}-{step}"))
        if not sequences:
            return {"train/skipped": 1.0}
        batch = pack(sequences, self.plan)
        metrics = {
            "train/skipped": 0.0,
            "train/num_sequences": batch.num_sequences,
            "train/num_tokens": batch.num_tokens,
        }
        if self.reference is not None:
            self.reference.forward(batch, "reference_logprobs")
        if self.reward_model is not None:
            reward_loss = partial(self.reward_loss, batch=batch)
            # The token weights use the scores of the first pass, from before the reward model's own update.
            metrics |= self.reward_model.train_step(batch, reward_loss, keep="token_scores")
            for _ in range(1, self.reward_model_updates):
                metrics |= self.reward_model.train_step(batch, reward_loss)
        for microbatch in batch.microbatches:
            fill_coefficients(microbatch, batch, self.config)
        policy_loss = partial(self.policy_loss, batch=batch)
        if self.is_frozen(step):
            return metrics | self.policy.measure(batch, policy_loss, keep="old_logprobs")
        metrics |= self.policy.train_step(batch, policy_loss, keep="old_logprobs")
        for _ in range(1, self.policy_updates):
            metrics |= self.policy.train_step(batch, policy_loss)
        return metrics

    def planned_updates(self, step: int) -> dict[str, int]:
        waits = self.is_frozen(step) and not self.config.freeze_advances_schedule
        planned = {"policy": 0 if waits else self.policy_updates}
        return planned if self.reward_model is None else planned | {"reward_model": self.reward_model_updates}

    def is_frozen(self, step: int) -> bool:
        """Returns whether this step leaves the policy unchanged, so that the reward model, if any, learns first."""
        return self.reward_model is not None and step < self.config.policy_freeze_steps

    def reward_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Returns the cross entropy of each sequence's mean score with its outcome (eq. 12)."""
        scores = align(outputs.values, self.config)
        output = outcome_cross_entropy(scores, microbatch, batch.num_sequences)
        correct, incorrect = microbatch.trained_correct, microbatch.trained_incorrect
        output.metrics |= {
            "score_correct": scores.detach().index_select(0, correct).sum() / max(1, batch.num_correct_tokens),
            "score_incorrect": scores.detach().index_select(0, incorrect).sum() / max(1, batch.num_incorrect_tokens),
        }
        return output

    def policy_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Returns the loss of eq. 11: cloning of correct samples, policy gradient of incorrect ones, and the KL."""
        terms = PolicyTerms(outputs, microbatch, batch, self.correction)
        logprobs, old_logprobs = terms.logprobs, terms.old_logprobs
        assert microbatch.coefficients is not None
        coefficients = terms.corrected(microbatch.coefficients)
        correct, incorrect = microbatch.trained_correct, microbatch.trained_incorrect
        positive = -(coefficients * logprobs).index_select(0, correct).sum()
        negative = -(coefficients * terms.ratio).index_select(0, incorrect).sum()
        is_initial = self.config.kl_target == "initial"
        target = microbatch.reference_logprobs if is_initial and self.reference is not None else old_logprobs
        assert target is not None
        divergence = terms.kl(self.config.kl_kind, target)
        # Eq. 11 takes the KL of whole sequences, which is the sum over their tokens.
        length = batch.num_tokens / batch.num_sequences if self.config.denominators == "sequences" else 1.0
        loss = positive + negative + self.config.kl_coef * length * divergence
        metrics = {
            "loss_positive": positive,
            "loss_negative": negative,
            "kl": divergence,
            "entropy": terms.entropy(),
        }
        return terms.output(loss, metrics | weight_metrics(microbatch, batch, correct, incorrect))


def select_sequences(groups: Sequence[Group], config: OrealConfig, rng: random.Random) -> list[TrainingSequence]:
    """Returns the sequences to train on; the list is empty if no group has both correct and incorrect samples.

    Advantages and pass rates are computed over the full group. Samples without a verdict count nowhere.
    """
    sequences: list[TrainingSequence] = []
    if not any(is_mixed(group) for group in groups):
        return sequences
    for group in groups:
        samples = group.judged_samples
        if len(samples) < 2 or not (is_mixed(group) or config.selection == "all"):
            continue
        advantages = group_advantages(samples, config)
        chosen = [index for index, sample in enumerate(samples) if not (config.filter_overlong and is_overlong(sample))]
        if config.selection == "one_pair":
            correct = [index for index in chosen if samples[index].is_correct]
            incorrect = [index for index in chosen if not samples[index].is_correct]
            # The filter may have removed all correct or all incorrect samples.
            chosen = [rng.choice(correct), rng.choice(incorrect)] if correct and incorrect else []
        for index in chosen:
            weight = sequence_weight(samples[index], advantages[index], group.pass_rate, config)
            sequences.append(training_sequence(samples[index], weight))
    return sequences


def group_advantages(samples: Sequence[Sample], config: OrealConfig) -> list[float]:
    low = -1.0 if config.rewards == "plus_minus_one" else 0.0
    rewards = torch.tensor([[1.0 if sample.is_correct else low for sample in samples]], dtype=torch.float64)
    advantages: list[float] = ADVANTAGES[config.advantage](rewards)[0].tolist()
    return advantages


def sequence_weight(sample: Sample, advantage: float, pass_rate: float, config: OrealConfig) -> float:
    """Returns the sequence's weight before token weights and denominators: positive if it is correct, else negative."""
    if sample.is_correct:
        return {"advantage": advantage, "one": 1.0}[config.positive_weight]
    reshaped = {"advantage": abs(advantage), "one_minus_pass_rate": 1.0 - pass_rate, "one": 1.0}
    return -reshaped[config.negative_weight]


def align(scores: Tensor, config: OrealConfig) -> Tensor:
    """Shifts scores [T] by one position, because the score of token t + 1 belongs to the log-prob at position t."""
    return scores if config.score_position == "before" else scores.roll(-1)


def fill_coefficients(microbatch: Microbatch, batch: Batch, config: OrealConfig) -> None:
    """Fills the token weights and the coefficients of eq. 11: advantage x token weight (x eta) / count.

    The token weights use the scores that the reward model's first pass kept; without a reward model they are 1.
    """
    correct = microbatch.is_correct[microbatch.sequence_ids]
    if microbatch.token_scores is None:
        weights = torch.ones_like(microbatch.advantages)
    else:
        scores, mask = pad_responses(align(microbatch.token_scores, config), microbatch)
        positive, negative = TOKEN_WEIGHTS[config.token_weights](scores, mask, config)
        weights = unpad_responses(torch.where(microbatch.is_correct[:, None], positive, negative), microbatch)
    num_correct, num_incorrect = max(1, batch.num_correct_tokens), max(1, batch.num_incorrect_tokens)
    if config.denominators == "sequences":
        num_correct = num_incorrect = batch.num_sequences
    scale = torch.where(correct, 1.0 / num_correct, config.negative_coef / num_incorrect)
    microbatch.token_weights = torch.where(microbatch.loss_mask, weights, 0.0)
    microbatch.coefficients = microbatch.advantages * microbatch.token_weights * scale


def token_weights(scores: Tensor, mask: Tensor, prefix_mean: bool = True) -> tuple[Tensor, Tensor]:
    """Returns (positive, negative) = max(2 sigmoid(s) - 1, 0) and max(1 - 2 sigmoid(s), 0), eq. 10.

    The arguments are scores [N, T] and mask [N, T] bool. Both results are [N, T], detached, and 0 outside the mask,
    where scores are never read. With `prefix_mean`, s is the mean of the scores up to and including the token (the
    reference code); without it, s is the token's own score (the paper).
    """
    score = effective_scores(scores, mask, prefix_mean)
    probability = torch.sigmoid(score)
    positive = (2.0 * probability - 1.0).clamp(0.0, 1.0)
    negative = (1.0 - 2.0 * probability).clamp(0.0, 1.0)
    return torch.where(mask, positive, 0.0), torch.where(mask, negative, 0.0)


def effective_scores(scores: Tensor, mask: Tensor, prefix_mean: bool) -> Tensor:
    scores = torch.where(mask, scores.detach(), 0.0)
    return scores.cumsum(dim=-1) / mask.cumsum(dim=-1).clamp_min(1) if prefix_mean else scores


def threshold_weights(scores: Tensor, mask: Tensor, config: OrealConfig) -> tuple[Tensor, Tensor]:
    return token_weights(scores, mask, config.prefix_mean)


def mean_one_weights(scores: Tensor, mask: Tensor, config: OrealConfig) -> tuple[Tensor, Tensor]:
    """Scales the weights of eq. 10 to mean one over each sequence; if all are zero, they all become one."""
    positive, negative = token_weights(scores, mask, config.prefix_mean)
    return mean_one(positive, mask), mean_one(negative, mask)


def mean_one(weights: Tensor, mask: Tensor) -> Tensor:
    mean = weights.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.where(mean > 0, weights / mean.clamp_min(torch.finfo(weights.dtype).tiny), mask.to(weights.dtype))


def top_k_weights(scores: Tensor, mask: Tensor, config: OrealConfig) -> tuple[Tensor, Tensor]:
    """Keeps the `top_k_ratio` of tokens with the highest (lowest) scores, and min-max normalises them to [0, 1]."""
    probability = torch.sigmoid(effective_scores(scores, mask, config.prefix_mean))
    return top_share(probability, mask, config.top_k_ratio), top_share(1.0 - probability, mask, config.top_k_ratio)


def top_share(values: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Returns [N, T] in [0, 1]: floor(ratio * length) tokens of each row, at least one, keep their normalised value.

    The normalisation runs over the kept tokens only, as in the reference code, so that the lowest of them gets 0. If
    all kept tokens are equal, all get 1.
    """
    # A stable sort keeps the earlier of two equal tokens on every device.
    order = torch.where(mask, values, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    counts = (mask.sum(dim=-1, keepdim=True).double() * ratio).long().clamp_min(1)
    kept = mask & (rank < counts)
    low = torch.where(kept, values, torch.inf).amin(dim=-1, keepdim=True)
    high = torch.where(kept, values, -torch.inf).amax(dim=-1, keepdim=True)
    normalised = torch.where(high > low, (values - low) / (high - low), 1.0)
    return torch.where(kept, normalised, 0.0)


TOKEN_WEIGHTS: dict[str, Callable[[Tensor, Tensor, OrealConfig], tuple[Tensor, Tensor]]] = {
    "threshold": threshold_weights,
    "mean_one": mean_one_weights,
    "top_k": top_k_weights,
}


def weight_metrics(microbatch: Microbatch, batch: Batch, correct: Tensor, incorrect: Tensor) -> dict[str, Tensor]:
    weights = microbatch.token_weights
    assert weights is not None
    return {
        "weight_positive": weights.index_select(0, correct).sum() / max(1, batch.num_correct_tokens),
        "weight_negative": weights.index_select(0, incorrect).sum() / max(1, batch.num_incorrect_tokens),
        "weight_zero_share": (weights.index_select(0, microbatch.trained) == 0).sum() / batch.num_tokens,
        "weight_max": weights.max(),
    }
