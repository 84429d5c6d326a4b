"""Selects data between rounds of training: correct responses to imitate, and prompts with skills that often fail.

OREAL's first stage (Lyu et al. 2025) samples responses, keeps the verified ones and fine-tunes on them. It draws
questions more often if responses to other questions with the same skill tags were often incorrect.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class AnsweredPrompt:
    """A prompt of an evaluation with the responses that the verifier could judge."""

    id: str
    responses: tuple[tuple[str, bool], ...]  # (text, is correct) of every judged sample

    @property
    def pass_rate(self) -> float:
        return sum(correct for _, correct in self.responses) / len(self.responses) if self.responses else 0.0


def select_responses(
    answered: Sequence[AnsweredPrompt], per_prompt: int, max_pass_rate: float, seed: int
) -> list[tuple[str, str]]:
    """Returns (prompt id, correct response) pairs: up to `per_prompt` distinct texts of each prompt, drawn at random.

    Prompts that are solved more often than `max_pass_rate` teach little and are left out.
    """
    selected = []
    for prompt in answered:
        if prompt.pass_rate > max_pass_rate:
            continue
        distinct = list(dict.fromkeys(text for text, correct in prompt.responses if correct))
        rng = random.Random(f"{seed}/{prompt.id}")
        chosen = rng.sample(distinct, min(per_prompt, len(distinct)))
        selected += [(prompt.id, text) for text in chosen]
    return selected


def tag_failure_rates(answered: Sequence[AnsweredPrompt], tags: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Returns each tag's mean of 1 - pass rate over its prompts; prompts without a judged sample do not count."""
    failures: dict[str, list[float]] = {}
    for prompt in (each for each in answered if each.responses):
        for tag in tags.get(prompt.id, ()):
            failures.setdefault(tag, []).append(1.0 - prompt.pass_rate)
    return {tag: sum(rates) / len(rates) for tag, rates in failures.items()}


def resample_by_tags(
    failure_rates: Mapping[str, float], tags: Mapping[str, Sequence[str]], count: int, seed: int
) -> list[str]:
    """Draws `count` prompt ids, without repeats, in proportion to the mean failure rate of their tags.

    Prompts whose tags all have failure rate 0 are not drawn. Raises ValueError if too few prompts are left.
    """
    weights = {
        id_: sum(failure_rates.get(tag, 0.0) for tag in prompt_tags) / len(prompt_tags)
        for id_, prompt_tags in tags.items()
        if prompt_tags
    }
    weights = {id_: weight for id_, weight in weights.items() if weight > 0}
    if len(weights) < count:
        raise ValueError(f"--count must be <= {len(weights)}, the prompts that share a failed tag, got {count}")
    rng = random.Random(f"{seed}/tags")
    # Weighted draws without replacement (Efraimidis and Spirakis 2006) take the largest u^(1 / weight).
    keys = {id_: rng.random() ** (1.0 / weight) for id_, weight in weights.items()}
    return sorted(keys, key=lambda id_: (-keys[id_], id_))[:count]
