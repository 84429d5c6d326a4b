"""Chooses the samples of a group that are trained on."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.types import Group, Sample, TrainingSequence


def is_mixed(group: Group) -> bool:
    """Returns whether the group has both correct and incorrect samples."""
    return 0.0 < group.pass_rate < 1.0


def is_overlong(sample: Sample) -> bool:
    """Returns whether the length limit cut the response. DAPO's filter (Yu et al. 2025) excludes such a sample."""
    return sample.finish_reason == "length"


def first_correct(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Returns the first `count` correct samples in the order in which they were drawn, or all if there are fewer.

    This is the selection of pure rejection sampling; the sampler draws until there are `count` correct samples or it
    reaches a limit. The selection depends on the order alone, so each selected sample has the distribution of a
    correct sample, and their mean gradient is an unbiased estimate of the gradient of log p.
    """
    return [sample for sample in samples if sample.is_correct][:count]


def training_sequence(sample: Sample, weight: float) -> TrainingSequence:
    """Turns a sample into a sequence to train on; `weight` becomes the advantage of its tokens."""
    return TrainingSequence(
        prompt_ids=sample.prompt_ids,
        response_ids=sample.response_ids,
        advantage=weight,
        is_correct=sample.is_correct,
        model_logprobs=sample.model_logprobs,
        rollout_logprobs=sample.rollout_logprobs,
    )
