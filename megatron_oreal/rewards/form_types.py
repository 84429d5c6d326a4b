"""Defines the forms that an answer can have at its top level; the expressions within a form stay LaTeX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron_oreal.rewards.units import Factors


@dataclass(slots=True, frozen=True)
class Scalar:
    """One expression or word, or text that the parser does not understand."""

    text: str


@dataclass(slots=True, frozen=True)
class Collection:
    kind: Literal["list", "set", "tuple"]
    elements: tuple[Form, ...]
    joint: str = ","  # between the elements of a list: "," or "and" or "or"


@dataclass(slots=True, frozen=True)
class Assignment:
    """A name and its values, which must agree: `x = 5`, `f(x) = x^2 = xx`, `x \\in [1,2]`."""

    name: str
    values: tuple[Form, ...]


@dataclass(slots=True, frozen=True)
class Equation:
    operands: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class Inequality:
    """Operands in ascending order: `b > a` becomes `a < b`; `is_strict` has one entry per sign."""

    operands: tuple[str, ...]
    is_strict: tuple[bool, ...]


@dataclass(slots=True, frozen=True)
class Interval:
    start: str
    end: str
    is_start_open: bool
    is_end_open: bool


@dataclass(slots=True, frozen=True)
class Region:
    """A union of intervals, of a variable if one was named; points are closed intervals of length zero."""

    intervals: tuple[Interval, ...]
    variable: str = ""
    excluded: tuple[str, ...] = ()  # points that the region leaves out


@dataclass(slots=True, frozen=True)
class Declaration:
    r"""The declaration of an integer: `k \in \mathbb{Z}`."""

    name: str
    number_set: str


@dataclass(slots=True, frozen=True)
class Measured:
    value: Form
    unit: Factors


@dataclass(slots=True, frozen=True)
class Approximated:
    r"""An approximation such as `\\sqrt{2} \\approx 1.41`; the exact value counts."""

    exact: Form
    approximation: str


@dataclass(slots=True, frozen=True)
class Ratio:
    parts: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class Congruence:
    left: str
    residue: str
    modulus: str


@dataclass(slots=True, frozen=True)
class Table:
    """The rows of a matrix or of a case distinction."""

    kind: Literal["matrix", "determinant", "cases"]
    rows: tuple[tuple[str, ...], ...]


Form: TypeAlias = (
    Scalar
    | Collection
    | Assignment
    | Equation
    | Inequality
    | Region
    | Declaration
    | Measured
    | Approximated
    | Ratio
    | Congruence
    | Table
)

INFINITE = Interval(r"-\infty", r"\infty", True, True)
