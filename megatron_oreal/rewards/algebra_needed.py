"""Defines what the comparison of forms needs of an algebra system, and an implementation that refuses all of it."""

from __future__ import annotations

from typing import Protocol


class AlgebraNeeded(Exception):
    """Signals that spellings and plain numbers do not suffice to compare two answers."""


class Algebra(Protocol):
    """The operations on expressions that a comparison needs; both arguments are normalised LaTeX."""

    def equal(self, prediction: str, reference: str) -> bool: ...

    def equations_agree(self, prediction: tuple[str, str], reference: tuple[str, str], same_sign: bool) -> bool:
        """Returns whether (left, right) are the same equation, or with `same_sign` the same inequality."""
        ...

    def solve(self, left: str, right: str) -> str | None:
        """Returns the solution of an equation that is linear in its only unknown."""
        ...

    def order_key(self, text: str) -> float | None: ...


class NoAlgebra:
    """Raises AlgebraNeeded in every method."""

    def equal(self, prediction: str, reference: str) -> bool:
        raise AlgebraNeeded

    def equations_agree(self, prediction: tuple[str, str], reference: tuple[str, str], same_sign: bool) -> bool:
        raise AlgebraNeeded

    def solve(self, left: str, right: str) -> str | None:
        raise AlgebraNeeded

    def order_key(self, text: str) -> float | None:
        raise AlgebraNeeded


NO_ALGEBRA = NoAlgebra()
