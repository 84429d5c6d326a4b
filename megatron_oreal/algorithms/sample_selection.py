"""Which samples of a group are trained on, and as what."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.types import Group, Sample, TrainingSequence


def is_mixed(group: Group) -> bool:
    """Whether the group has correct and incorrect samples."""
    return 0.0 < group.pass_rate < 1.0


def first_correct(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Pure rejection sampling, seen from after the draws: the first `count` correct samples, in the order drawn.

    Fewer where the draws were at their limit. Which ones are kept depends on nothing but the order, so each has the law
    of a correct sample: their mean gradient estimates that of log p without bias. Drawing until there are `count` of
    them, or a limit is reached, is the sampler's task.
    """
    return [sample for sample in samples if sample.is_correct][:count]


def training_sequence(sample: Sample, weight: float) -> TrainingSequence:
    return TrainingSequence(
        prompt_ids=sample.prompt_ids,
        response_ids=sample.response_ids,
        advantage=weight,
        is_correct=sample.is_correct,
        model_logprobs=sample.model_logprobs,
    )
