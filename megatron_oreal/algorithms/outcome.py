"""Outcome objectives: any h(p) of the pass rate p over one weighted log-prob loss.

The weights Z of the samples say what is optimised (objectives.py; Davis & Recht 2025, arXiv:2510.13651). Settings add
PPO's clipped surrogate with different bounds up and down, the length normalisations of GRPO (Shao et al. 2024), DAPO
(Yu et al. 2025) and Dr. GRPO (Liu et al. 2025), GSPO's sequence ratio (Zheng et al. 2025), a KL to the initial policy,
and DAPO's filter of groups that are all correct or all incorrect.

The loss is -sum_i sum_t c_it min(ratio_it Z_i, clip(ratio_it) Z_i), where c_it is 1/(N |y_i|), 1/(number of tokens) or
1/(N constant): N samples, over all ranks and all groups that are used, the samples of weight 0 too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from megatron_oreal.algorithms.losses import PolicyTerms, bounded_exp, sequence_mean, trained_tokens
from megatron_oreal.algorithms.model import Metrics, Model, ModelSource
from megatron_oreal.algorithms.objectives import OBJECTIVES, Table, option_names, weights
from megatron_oreal.algorithms.sample_selection import first_correct, is_mixed, training_sequence
from megatron_oreal.config import Correction, OutcomeConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import Batch, Group, LossOutput, Microbatch, Sample, TokenOutputs, TrainingSequence


@dataclass(slots=True)
class Outcome:
    """The algorithm with its models and the weights of its objective."""

    config: OutcomeConfig
    plan: PackingPlan
    group_size: int  # The size of a group whose samples all have a verdict.
    policy: Model
    reference: Model | None = None  # None where no KL asks for it.
    policy_updates: int = 1  # Optimizer steps on one set of groups.
    correction: Correction | None = None  # Of samples that are not the trained policy's own; None: none.
    tables: dict[int, Table] = field(default_factory=dict)  # The weights for each number of judged samples met so far.

    def __post_init__(self) -> None:
        assert self.reference is not None or self.config.kl_coef == 0, "a KL to the initial policy needs the reference"
        check_objective(self.config, self.group_size)

    @classmethod
    def build(cls, config: OutcomeConfig, run: TrainConfig, models: ModelSource) -> Outcome:
        """The objective with the models that its configuration asks for."""
        return cls(
            config=config,
            plan=models.plan,
            group_size=run.rollout.group_size,
            policy=models.policy(run.num_steps * run.policy.updates_per_step),
            reference=models.reference() if config.uses_reference else None,
            policy_updates=run.policy.updates_per_step,
            correction=run.correction,
        )

    def update(self, groups: Sequence[Group], _step: int) -> Metrics:
        """Takes all optimizer steps on these groups; where no sample has a weight, only says that it skipped."""
        used = [group for group in groups if is_mixed(group) or not self.config.dynamic_sampling]
        sequences = [sequence for group in used for sequence in self.weigh(group)]
        weighted = [sequence for sequence in sequences if sequence.advantage != 0]
        if not weighted:
            return {"train/skipped": 1.0}
        # A sample of weight 0 counts in the denominators; only a KL has something to say about its tokens.
        batch = pack(sequences if self.config.kl_coef > 0 else weighted, self.plan)
        num_tokens = sum(len(sequence.response_ids) for sequence in sequences)
        for microbatch in batch.microbatches:
            fill_coefficients(microbatch, len(sequences), num_tokens, self.config)
        metrics = {
            "train/skipped": 0.0,
            "train/num_groups": len(used),
            "train/num_sequences": batch.num_sequences,
            "train/num_tokens": batch.num_tokens,
        }
        if self.reference is not None:
            self.reference.forward(batch, "reference_logprobs")
        policy_loss = partial(self.policy_loss, batch=batch)
        metrics |= self.policy.train_step(batch, policy_loss, keep="old_logprobs")
        for _ in range(1, self.policy_updates):
            metrics |= self.policy.train_step(batch, policy_loss)
        return metrics

    def planned_updates(self, _step: int) -> dict[str, int]:
        return {"policy": self.policy_updates}

    def weigh(self, group: Group) -> list[TrainingSequence]:
        """Returns the samples that count, each with its weight Z; samples without a verdict count nowhere."""
        samples = group.judged_samples
        if self.config.objective == "pure_rejection_sampling":
            return [training_sequence(sample, 1.0) for sample in first_correct(samples, self.config.num_correct)]
        if len(samples) < min(2, self.group_size):  # Too few samples are left for what was configured.
            return []
        return [training_sequence(sample, weight) for sample, weight in zip(samples, self.z(samples), strict=True)]

    def z(self, samples: Sequence[Sample]) -> list[float]:
        """Returns the weight Z of each sample of a group."""
        size, num_correct = len(samples), sum(sample.is_correct for sample in samples)
        if size not in self.tables:
            self.tables[size] = objective_table(self.config, size)
        a, b = self.tables[size]
        return [float(b[num_correct - 1] if sample.is_correct else a[num_correct]) for sample in samples]

    def policy_loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        """Returns the clipped, weighted log-prob loss, with the KL to the initial policy where it is asked for."""
        terms = PolicyTerms(outputs, microbatch, batch, self.correction)
        assert microbatch.coefficients is not None
        coefficients = terms.corrected(microbatch.coefficients)
        ratio = self.ratio(terms.logprobs - terms.old_logprobs, microbatch)
        clipped = ratio.clamp(*self.clip_bounds)
        gains = torch.minimum(coefficients * ratio, coefficients * clipped)
        loss = surrogate = -gains.index_select(0, microbatch.trained).sum()
        metrics = {
            "loss_surrogate": surrogate,
            "entropy": terms.entropy(),
            "ratio_max": ratio.max(),
            "clip_share": terms.mean(ratio != clipped),
        }
        if microbatch.reference_logprobs is not None:
            metrics["kl"] = kl = terms.kl(self.config.kl_kind, microbatch.reference_logprobs)
            loss = loss + self.config.kl_coef * kl
        return terms.output(loss, metrics)

    def ratio(self, difference: Tensor, microbatch: Microbatch) -> Tensor:
        """Returns each token's ratio to the old policy, or the geometric mean of those of its sequence: [T]."""
        if self.config.ratio == "sequence":
            return bounded_exp(sequence_mean(difference, microbatch))[microbatch.sequence_ids]
        return bounded_exp(difference)

    @property
    def clip_bounds(self) -> tuple[float, float]:
        low, high = self.config.clip_low, self.config.clip_high
        return 0.0 if low is None else 1.0 - low, float("inf") if high is None else 1.0 + high


def fill_coefficients(microbatch: Microbatch, num_sequences: int, num_tokens: int, config: OutcomeConfig) -> None:
    """Fills Z times the token's share in the loss. The counts are those of all ranks, samples of weight 0 included."""
    if config.normalisation == "token":
        share: Tensor | float = 1.0 / num_tokens
    elif config.normalisation == "constant":
        share = 1.0 / (num_sequences * config.constant_tokens)
    else:
        lengths = trained_tokens(microbatch).clamp_min(1)[microbatch.sequence_ids]
        share = 1.0 / (num_sequences * lengths)
    microbatch.coefficients = microbatch.advantages * share


def check_objective(config: OutcomeConfig, group_size: int) -> None:
    """Raises ValueError, one line, where the objective has no weights for groups of this size. Warns of a falling h."""
    if config.objective == "pass_at_n" and config.n > group_size:
        raise ValueError(f"algorithm.n={config.n} must be <= rollout.group_size={group_size}: lower it")
    if config.objective != "pure_rejection_sampling":
        objective_table(config, group_size)


def objective_table(config: OutcomeConfig, group_size: int) -> Table:
    """Returns (a, b) of the configured objective for `group_size` judged samples."""
    names = option_names(OBJECTIVES[config.objective])
    options = config.model_dump(include=set(names))
    if "n" in options:
        # Where fewer than n samples have a verdict, n is the largest that they allow.
        options["n"] = min(config.n, group_size)
    return weights(config.objective, group_size, **options)
