"""What the comparison of forms asks of an algebra system, and the one that has none."""

from __future__ import annotations

from typing import Protocol


class AlgebraNeeded(Exception):
    """The comparison takes more than spellings and plain numbers."""


class Algebra(Protocol):
    """What expressions are compared with; both arguments are normalised LaTeX."""

    def equal(self, prediction: str, reference: str) -> bool: ...

    def equations_agree(self, prediction: tuple[str, str], reference: tuple[str, str], same_sign: bool) -> bool:
        """Whether (left, right) are the same equation, or with `same_sign` the same inequality."""
        ...

    def solve(self, left: str, right: str) -> str | None:
        """The solution of an equation that is linear in its only unknown."""
        ...

    def order_key(self, text: str) -> float | None: ...


class NoAlgebra:
    """Raises AlgebraNeeded whatever it is asked."""

    def equal(self, prediction: str, reference: str) -> bool:
        raise AlgebraNeeded

    def equations_agree(self, prediction: tuple[str, str], reference: tuple[str, str], same_sign: bool) -> bool:
        raise AlgebraNeeded

    def solve(self, left: str, right: str) -> str | None:
        raise AlgebraNeeded

    def order_key(self, text: str) -> float | None:
        raise AlgebraNeeded


NO_ALGEBRA = NoAlgebra()
