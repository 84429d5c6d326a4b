"""Carries out a comparison in a worker process; each step has a budget of CPU time."""

from __future__ import annotations

import functools
from typing import Protocol

from megatron_oreal.rewards.algebra import ExactAlgebra, Fallback, math_verify_fallback
from megatron_oreal.rewards.comparison import is_same
from megatron_oreal.rewards.references import evaluate_alone

MAX_REMEMBERED_REFERENCES = 1024


class Budget(Protocol):
    def start(self) -> None: ...

    def stop(self) -> None: ...


class Comparer:
    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.algebra = ExactAlgebra(self.fall_back)
        self.remember_reference = functools.lru_cache(maxsize=MAX_REMEMBERED_REFERENCES)(self.evaluate)

    def evaluate_reference(self, reference: str) -> None:
        """Evaluates each reference once, because the samples of a group share their reference."""
        self.budget.start()
        self.remember_reference(reference)

    def evaluate(self, reference: str) -> None:
        evaluate_alone(reference, self.algebra)

    def is_same(self, prediction: str, reference: str) -> bool:
        self.budget.start()
        return is_same(prediction, reference, self.algebra)

    @functools.cached_property
    def fallback(self) -> Fallback:
        """Returns math-verify's comparison, imported at its first use and outside of the budget."""
        self.budget.stop()
        fallback = math_verify_fallback()
        fallback("x+1", "x+2")  # builds the parser's tables
        self.budget.start()
        return fallback

    def fall_back(self, prediction: str, reference: str) -> bool:
        return self.fallback(prediction, reference)
