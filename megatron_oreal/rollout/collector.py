"""A step's groups: one batch of prompts sampled once, or as many rounds as the algorithm needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_oreal.config import RolloutConfig
from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor
from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.observability.metrics import Metrics
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import Group


@dataclass(slots=True, frozen=True)
class Collected:
    groups: list[Group]  # to train on
    sampled: list[Group]  # all, also those that were not usable
    metrics: Metrics = field(default_factory=dict)  # of how they were made, on the first rank
    notes: list[str] = field(default_factory=list)  # for the log


@dataclass(slots=True)
class GroupCollector:
    """For an engine that all ranks call alike: verdicts are the same everywhere, and so is the number of rounds."""

    sampler: Sampler
    cursor: PromptCursor[EncodedPrompt]
    sampling: SamplingParams
    config: RolloutConfig
    prompts_per_step: int
    num_correct: int  # that each prompt should have; 0: whatever comes
    seed: int

    def collect(self, step: int) -> Collected:
        """With `prompt_rounds` > 1, new prompts are asked until `prompts_per_step` groups are mixed (DAPO)."""
        groups: list[Group] = []
        sampled: list[Group] = []
        for prompt_round in range(self.config.prompt_rounds):
            prompts = self.cursor.next_batch(self.prompts_per_step)
            fresh = self.draw(prompts, seed_of(f"{self.seed}/{step}", "prompts", prompt_round))
            sampled += fresh
            is_filtered = self.config.prompt_rounds > 1
            groups += [group for group in fresh if 0 < group.pass_rate < 1] if is_filtered else fresh
            if len(groups) >= self.prompts_per_step:
                break
        return Collected(groups[: self.prompts_per_step], sampled)

    def draw(self, prompts: Sequence[EncodedPrompt], seed: str) -> list[Group]:
        """`group_size` samples a prompt; up to `draw_rounds` times as many where correct ones are missing."""
        size = self.config.group_size
        groups = self.sampler.sample(prompts, size, self.sampling, seed)

        def draw(missing: Sequence[int], seed: str) -> list[Group]:
            return self.sampler.sample([prompts[index] for index in missing], size, self.sampling, seed)

        draw_again(groups, self.num_correct, self.config.draw_rounds, seed, draw)
        return groups

    def close(self) -> None:
        """Nothing runs between two steps."""


def draw_again(
    groups: Sequence[Group],
    num_correct: int,
    draw_rounds: int,
    seed: str,
    draw: Callable[[Sequence[int], str], list[Group]],
) -> None:
    """Adds samples to the groups with fewer than `num_correct` correct ones; `draw` takes their numbers and a seed."""
    for draw_round in range(1, draw_rounds):
        missing = [index for index, group in enumerate(groups) if count_correct(group) < num_correct]
        if not missing:
            break
        for index, group in zip(missing, draw(missing, seed_of(seed, "draws", draw_round)), strict=True):
            groups[index].samples += group.samples


def seed_of(seed: str, kind: str, number: int) -> str:
    return f"{seed}/{kind}{number}" if number else seed


def count_correct(group: Group) -> int:
    return sum(sample.is_correct for sample in group.samples)
