"""Outcome objectives: one weighted log-prob loss optimises any function h(p) of the pass rate p.

The weights Z of the samples define h (objectives.py; Davis & Recht 2025, arXiv:2510.13651). Settings add PPO's clipped
surrogate with separate lower and upper bounds, the length normalisations of GRPO (Shao et al. 2024), DAPO (Yu et al.
2025) and Dr. GRPO (Liu et al. 2025), GSPO's sequence ratio (Zheng et al. 2025), CISPO's weighted log-probs (MiniMax
2025, arXiv:2506.13585), a KL to the initial policy, and DAPO's filters and its punishment of long responses.
REINFORCE++ (Hu et al. 2025, arXiv:2501.03262) whitens the weights over the step's tokens. On-policy distillation adds
log(teacher / old policy) to each token's weight; the mean gradient of this term is that of -KL(policy || teacher).

The loss is -sum_i sum_t c_it min(ratio_it Z_i, clip(ratio_it) Z_i), where c_it is 1/(N |y_i|), 1/(number of tokens) or
1/(N constant). N counts the samples of all ranks and of all used groups, including samples of weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megatron_oreal.algorithms.advantages import leave_one_out, normalised, overlong_penalty, whiten
from megatron_oreal.algorithms.covariance import hold_back, seed_of_step
from megatron_oreal.algorithms.losses import PolicyTerms, bounded_exp, sequence_mean, trained_tokens
from megatron_oreal.algorithms.model import Metrics, Model, ModelSource
from megatron_oreal.algorithms.objectives import OBJECTIVES, Table, option_names, weights
from megatron_oreal.algorithms.sample_selection import first_correct, is_mixed, is_overlong, training_sequence
from megatron_oreal.config import Correction, OutcomeConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import (
    Batch,
    Group,
    LossOutput,
    Microbatch,
    Sample,
    TokenOutputs,
    TokenStream,
    TrainingSequence,
)


@dataclass(slots=True)
class Outcome:
    """The algorithm with its models and the weights of its objective."""

    config: OutcomeConfig
    plan: PackingPlan
    group_size: int  # The size of a group whose samples all have a verdict.
    policy: Model
    reference: Model | None = None  # None without a KL or a teacher.
    policy_updates: int = 1  # Optimizer steps on one set of groups.
    seed: int = 0
    longest_response: Callable[[int], int] | None = None  # Number of prompt tokens -> longest response, in tokens.
    correction: Correction | None = None  # For off-policy samples; None corrects nothing.
    tables: dict[int, Table] = field(default_factory=dict)  # Number of judged samples -> weights; a cache.

    def __post_init__(self) -> None:
        assert self.reference is not None or not self.config.uses_reference, "a KL needs the reference"
        assert self.longest_response is not None or self.config.overlong_tokens == 0, "long is what nears the limit"
        check_objective(self.config, self.group_size)

    @classmethod
    def build(cls, config: OutcomeConfig, run: TrainConfig, models: ModelSource) -> Outcome:
        """Builds the algorithm with the models that its configuration asks for."""
        reference = None
        if config.uses_reference:
            path = config.reference_path
            reference = models.reference() if path is None else models.teacher(path)
        return cls(
            config=config,
            plan=models.plan,
            group_size=run.rollout.group_size,
            policy=models.policy(run.num_steps * run.policy.updates_per_step),
            reference=reference,
            policy_updates=run.policy.updates_per_step,
            seed=run.seed,
            longest_response=run.rollout.longest_response,
            correction=run.correction,
        )

    def update(self, groups: Sequence[Group], step: int) -> Metrics:
        """Takes all optimizer steps on these groups; if no sample has a weight it returns {"train/skipped": 1.0}."""
        used = [group for group in groups if is_mixed(group) or not self.config.dynamic_sampling]
        sequences = [sequence for group in used for sequence in self.weigh(group)]
        if not self.has_signal(sequences):
            return {"train/skipped": 1.0}
        # A sample of weight 0 counts in the denominators; it is packed only if another term acts on its tokens.
        weighted = [sequence for sequence in sequences if sequence.advantage != 0]
        batch = pack(sequences if self.packs_all else weighted, self.plan)
        num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
        metrics = {
            "train/skipped": 0.0,
            "train/num_groups": len(used),
            "train/num_sequences": batch.num_sequences,
            "train/num_tokens": batch.num_tokens,
        }
        if self.config.whiten_advantages:
            metrics |= whiten(batch, self.policy.sum_over_data)
        for microbatch in batch.microbatches:
            fill_coefficients(microbatch, len(sequences), num_tokens, self.config)
        if self.reference is not None:
            self.reference.forward(batch, "reference_logprobs")
        keep: TokenStream | None = "old_logprobs"
        if self.config.covariance != "none":
            self.policy.forward(batch, "old_logprobs")
            keep = None
            seed = seed_of_step(self.seed, step)
            metrics |= hold_back(batch, self.config, self.plan, seed, self.policy.sum_over_data)
        policy_loss = partial(self.policy_loss, batch=batch)
        metrics |= self.policy.train_step(batch, policy_loss, keep=keep)
        for _ in range(1, self.policy_updates):
            metrics |= self.policy.train_step(batch, policy_loss)
        return metrics

    def planned_updates(self, _step: int) -> dict[str, int]:
        return {"policy": self.policy_updates}

    @property
    def packs_all(self) -> bool:
        """Returns whether the passes include samples of weight 0."""
        config = self.config
        return config.uses_reference or config.whiten_advantages or config.covariance != "none"

    def has_signal(self, sequences: Sequence[TrainingSequence]) -> bool:
        """Returns whether any term of the loss acts on these samples."""
        if self.config.objective == "distillation" or self.config.distill_coef > 0:
            return bool(sequences)
        weights = {sequence.advantage for sequence in sequences}
        return len(weights) > 1 if self.config.whiten_advantages else bool(weights - {0.0})

    def weigh(self, group: Group) -> list[TrainingSequence]:
        """Returns the samples to train on, each with its weight Z; samples without a verdict count nowhere."""
        samples = group.judged_samples
        if self.config.objective == "pure_rejection_sampling":
            samples = first_correct(samples, self.config.num_correct)
            weighed = [(sample, 1.0) for sample in samples]
        elif len(samples) < min(2, self.group_size):  # Too few samples have a verdict.
            weighed = []
        else:
            weighed = list(zip(samples, self.z(samples), strict=True))
        return [
            training_sequence(sample, weight)
            for sample, weight in weighed
            if not (self.config.filter_overlong and is_overlong(sample))
        ]

    def z(self, samples: Sequence[Sample]) -> list[float]:
        """Returns the weight Z of each sample of a group."""
        if self.config.objective == "distillation":
            return [0.0] * len(samples)
        if self.config.overlong_tokens > 0:
            return self.z_of_punished(samples)
        size, num_correct = len(samples), sum(sample.is_correct for sample in samples)
        if size not in self.tables:
            self.tables[size] = objective_table(self.config, size)
        a, b = self.tables[size]
        return [float(b[num_correct - 1] if sample.is_correct else a[num_correct]) for sample in samples]

    def z_of_punished(self, samples: Sequence[Sample]) -> list[float]:
        """Returns the weights Z for rewards from which the punishment of long responses is subtracted."""
        assert self.longest_response is not None
        config, rewards = self.config, []
        for sample in samples:
            limit = self.longest_response(len(sample.prompt_ids))
            penalty = overlong_penalty(len(sample.response_ids), limit, config.overlong_tokens)
            rewards.append(float(sample.is_correct) - config.overlong_penalty * penalty)
        shaped = torch.tensor([rewards], dtype=torch.float64)
        if config.objective == "rloo":
            shaped = leave_one_out(shaped)
        elif config.objective == "grpo":
            shaped = normalised(shaped, config.std, config.epsilon)
        found: list[float] = shaped[0].tolist()
        return found

    def policy_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Returns the clipped, weighted log-prob loss, with the KL to the initial policy if it is configured."""
        terms = PolicyTerms(outputs, microbatch, batch, self.correction)
        coefficients = terms.corrected(self.coefficients(terms, microbatch))
        difference = terms.logprobs - terms.old_logprobs
        ratio = self.ratio(difference, microbatch)
        clipped = ratio.clamp(*self.clip_bounds)
        gains = SURROGATES[self.config.surrogate](coefficients, ratio, clipped, terms.logprobs)
        loss = surrogate = -gains.index_select(0, microbatch.trained).sum()
        metrics = {
            "loss_surrogate": surrogate,
            "entropy": terms.entropy(),
            "ratio_max": ratio.max(),
            "clip_share": terms.mean(ratio != clipped),
        }
        if microbatch.penalties is not None:
            metrics["covariance_penalty"] = penalty = (microbatch.penalties * difference.abs()).sum()
            loss = loss + penalty
        if microbatch.reference_logprobs is not None:
            metrics["kl"] = kl = terms.kl(self.config.kl_kind, microbatch.reference_logprobs)
            loss = loss + self.config.kl_coef * kl
        return terms.output(loss, metrics)

    def coefficients(self, terms: PolicyTerms, microbatch: Microbatch) -> Tensor:
        """Returns the weight of each token's gain, [T]: the sample's weight, plus the log-ratio of a teacher."""
        assert microbatch.coefficients is not None and microbatch.shares is not None
        if self.config.distill_coef == 0:
            return microbatch.coefficients
        assert microbatch.reference_logprobs is not None
        advantages = self.config.distill_coef * (microbatch.reference_logprobs - terms.old_logprobs)
        return microbatch.coefficients + microbatch.shares * advantages

    def ratio(self, difference: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns each token's ratio to the old policy, or the geometric mean of the ratios of its sequence: [T]."""
        if self.config.ratio == "sequence":
            return bounded_exp(sequence_mean(difference, microbatch))[microbatch.sequence_ids]
        return bounded_exp(difference)

    @property
    def clip_bounds(self) -> tuple[float, float]:
        low, high = self.config.clip_low, self.config.clip_high
        return 0.0 if low is None else 1.0 - low, float("inf") if high is None else 1.0 + high


def clipped_gain(coefficients: Tensor, ratio: Tensor, clipped: Tensor, _logprobs: Tensor) -> Tensor:
    """Returns PPO's clipped surrogate, [T]: a token beyond the bound in the direction of its weight has no gradient."""
    return torch.minimum(coefficients * ratio, coefficients * clipped)


def weighted_logprob(coefficients: Tensor, _ratio: Tensor, clipped: Tensor, logprobs: Tensor) -> Tensor:
    """Returns CISPO's surrogate, [T]: every token keeps its gradient, weighted by the clipped ratio."""
    return coefficients * clipped.detach() * logprobs


SURROGATES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "clip": clipped_gain,
    "cispo": weighted_logprob,
}


def fill_coefficients(microbatch: Microbatch, num_sequences: int, num_tokens: int, config: OutcomeConfig) -> None:
    """Fills Z times the token's share in the loss. The counts cover all ranks and include samples of weight 0."""
    if config.normalisation == "token":
        share: Tensor | float = 1.0 / num_tokens
    elif config.normalisation == "constant":
        share = 1.0 / (num_sequences * config.constant_tokens)
    else:
        lengths = trained_tokens(microbatch).clamp_min(1)[microbatch.sequence_ids]
        share = 1.0 / (num_sequences * lengths)
    microbatch.coefficients = microbatch.advantages * share
    microbatch.shares = microbatch.loss_mask * share


def check_objective(config: OutcomeConfig, group_size: int) -> None:
    """Raises ValueError if the objective has no weights for groups of this size. Warns if h decreases somewhere."""
    if config.objective == "pass_at_n" and config.n > group_size:
        raise ValueError(f"algorithm.n={config.n} must be <= rollout.group_size={group_size}: lower it")
    if config.objective not in ("pure_rejection_sampling", "distillation"):
        try:
            objective_table(config, group_size)
        except ValueError as error:
            section = "rollout" if str(error).startswith("group_size") else "algorithm"
            raise ValueError(f"{section}.{error}") from None


def objective_table(config: OutcomeConfig, group_size: int) -> Table:
    """Returns (a, b) of the configured objective for `group_size` judged samples."""
    names = option_names(OBJECTIVES[config.objective])
    options = config.model_dump(include=set(names))
    if "n" in options:
        # pass_at_n needs n samples. If fewer have a verdict, their number takes the place of n.
        options["n"] = min(config.n, group_size)
    return weights(config.objective, group_size, **options)
