"""Selects samples and sorts them, for example with the worst first."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from megatron_oreal.reports.viewer.samples import ViewedSample


@dataclass(slots=True, frozen=True)
class Bounds:
    """A closed interval. Only an interval without ends contains an unknown value."""

    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float | None) -> bool:
        if value is None:
            return self == ANY
        return self.low <= value <= self.high


ANY = Bounds()


def parse_bounds(text: str, name: str) -> Bounds:
    """Reads "3", "3:5", "3:" or ":5", as a closed interval. Raises ValueError naming the option."""
    low, separator, high = text.partition(":")
    try:
        first = float(low) if low.strip() else -math.inf
        last = (float(high) if high.strip() else math.inf) if separator else first
    except ValueError:
        first, last = math.nan, math.nan
    if not first <= last or not text.strip(" :") or math.isnan(last):
        raise ValueError(f"{name}: {text!r} is no interval; give N, FIRST:LAST, FIRST: or :LAST, with FIRST <= LAST")
    return Bounds(first, last)


@dataclass(slots=True, frozen=True)
class Filters:
    """The conditions on samples; the page has the same filters, and viewer.js applies them in the same way."""

    steps: Bounds = ANY
    rewards: Bounds = ANY
    tokens: Bounds = ANY
    sources: tuple[str, ...] = ()  # empty: all
    statuses: tuple[str, ...] = ()  # empty: all
    disagreements: bool = False  # only samples about which judge and rules disagree
    search: str = ""  # a part of the prompt's id, prompt, answer, extracted answer or response, in any case

    def hold(self, sample: ViewedSample) -> bool:
        return (
            self.steps.holds(sample.step)
            and self.rewards.holds(sample.reward)
            and self.tokens.holds(sample.num_tokens)
            and (not self.sources or sample.source in self.sources)
            and (not self.statuses or sample.status in self.statuses)
            and (not self.disagreements or sample.judge_disagrees)
            and (not self.search or self.search.lower() in searched_text(sample))
        )


def searched_text(sample: ViewedSample) -> str:
    parts = (sample.prompt_id, sample.prompt, sample.answer, sample.extracted or "", sample.response)
    return "\n".join(parts).lower()


def check_names(filters: Filters, sources: Collection[str], statuses: Collection[str]) -> None:
    """Raises ValueError for a data set or a status that no sample has; the message lists the known ones."""
    for option, asked, known in (("--source", filters.sources, sources), ("--status", filters.statuses, statuses)):
        for name in asked:
            if name not in known:
                raise ValueError(f"{option}: no sample has {name!r}; there are {', '.join(map(repr, sorted(known)))}")


def worst_first(sample: ViewedSample) -> tuple[float, ...]:
    """Returns a sort key that puts the samples most in need of inspection first.

    Samples about which judge and rules disagree come first, then those without a verdict, then the lower rewards. Among
    equal rewards, the sample whose group has the higher pass rate comes first, because others of its group did better;
    then the one with the larger difference of log-probs, and then the longer one.
    """
    return (
        -float(sample.judge_disagrees),
        float(sample.is_decided),
        0.0 if sample.reward is None else sample.reward,
        0.0 if sample.pass_rate is None else -sample.pass_rate,
        0.0 if sample.difference is None else -sample.difference,
        0.0 if sample.num_tokens is None else -sample.num_tokens,
    )


def known_first(value: float | None, sign: float) -> tuple[float, ...]:
    return (1.0, 0.0) if value is None else (0.0, sign * value)


Order = Callable[[ViewedSample], tuple[float, ...]]
ORDERS: dict[str, Order] = {
    "worst": worst_first,
    "run": lambda sample: (),
    "newest": lambda sample: (-sample.step,),
    "longest": lambda sample: known_first(sample.num_tokens, -1),
    "shortest": lambda sample: known_first(sample.num_tokens, 1),
    "difference": lambda sample: known_first(sample.difference, -1),
    "logprob": lambda sample: known_first(sample.logprob, 1),
    "pass_rate": lambda sample: known_first(sample.pass_rate, 1),
}


def in_order(samples: Sequence[ViewedSample], order: str) -> list[ViewedSample]:
    """Sorts by one of ORDERS; samples of equal rank stay in the order of the run."""
    return sorted(samples, key=ORDERS[order])
