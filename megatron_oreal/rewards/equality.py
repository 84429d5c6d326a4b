"""Decides whether two expressions are equal: as exact fractions, else numerically, with several values of each symbol.

Two numbers are equal if they agree in many more digits than the magnitudes of their parts span; no answer within the
length limit of a thousand characters can defeat this. Symbols are real: if a negative value of a symbol makes an
expression complex (a root, a logarithm), that point is ignored; so sqrt(1/n) = 1/sqrt(n), but |x| and x differ.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mpmath.ctx_mp import MPContext

from megatron_oreal.rewards.evaluation import (
    CONTEXT,
    FIRST_PRECISION,
    MAX_PRECISION,
    Evaluator,
    TooCostly,
    Undefined,
    Value,
    rational,
    symbols,
)
from megatron_oreal.rewards.expression import Expression, NotAnExpression, difference, parse_expression

AGREEMENT = 100  # bits beyond the range of magnitudes
NUM_POINTS = 3  # at which expressions with symbols have to agree
ROUNDED_DECIMALS = 6  # decimals of a reference from which on an irrational answer may round to it
# Values of the symbols in the order of their names, with the signs below. They have no pattern that a formula matches.
POINT_ROWS: tuple[tuple[int, ...], ...] = (
    (1327, 2749, 907, 1873, 3391, 571, 4021, 1549), (2213, 733, 1597, 3019, 419, 2659, 1181, 3733),
    (1613, 887, 2311, 3109, 1021, 2467, 653, 1789), (887, 2081, 1321, 547, 3253, 1733, 2903, 461),
    (3671, 1913, 2837, 4547, 2339, 3947, 5003, 2063), (479, 1301, 3517, 2287, 1459, 809, 3163, 2131),
    (5231, 6007, 4793, 5519, 7103, 6361, 4391, 7919), (317, 211, 389, 263, 149, 347, 227, 283),
)  # fmt: skip
# Every pair of symbols takes all four combinations of signs.
SIGN_ROWS = ((1,), (-1,), (1, -1), (-1, 1), (1, 1, -1, -1), (-1, -1, 1, 1), (1, 1, 1, 1, -1, -1, -1, -1), (1,))
POINT_UNIT = 1009
WHOLE_ROWS: tuple[tuple[int, ...], ...] = (
    (3, 2, 5, 4, 7, 6, 9, 8),
    (6, 3, 4, 7, 2, 9, 5, 11),
    (5, 4, 3, 2, 6, 8, 7, 9),
)
SYMBOL_I = "i"
DECIMAL = re.compile(r"-?\d*\.(?P<decimals>\d+)")

Ratio = Literal["positive", "negative"] | None


def parse_alike(prediction: str, reference: str) -> tuple[Expression, Expression]:
    """Returns both trees; capital and small letters are equal unless a side uses both. Raises NotAnExpression."""
    one, other = parse_expression(prediction), parse_expression(reference)
    names = symbols(one) | symbols(other)
    if symbols(one) != symbols(other):
        one_names, other_names = symbols(one), symbols(other)
        folded = {name.lower() for name in names}
        is_folding_safe = len({n.lower() for n in one_names}) == len(one_names) and len(
            {n.lower() for n in other_names}
        ) == len(other_names)
        if len(folded) < len(names) and is_folding_safe:
            return lower_names(one), lower_names(other)
    return one, other


def lower_names(expression: Expression) -> Expression:
    if expression.operation == "symbol":
        return Expression("symbol", name=expression.name.lower())
    if not expression.operands:
        return expression
    return Expression(expression.operation, tuple(map(lower_names, expression.operands)), expression.value)


def are_equal(prediction: str, reference: str) -> bool:
    """Returns whether two LaTeX expressions are equal. Raises NotAnExpression."""
    one, other = parse_alike(prediction, reference)
    if agree(one, other):
        return True
    return is_rounded(reference, one)


def is_rounded(reference: str, prediction: Expression) -> bool:
    """Returns whether a reference of six or more decimals equals an irrational prediction after rounding."""
    found = DECIMAL.fullmatch(reference.strip())
    if found is None or len(found["decimals"]) < ROUNDED_DECIMALS or symbols(prediction):
        return False
    if rational(prediction) is not None:
        return False
    value = number_value(prediction)
    if value is None or value.imag:
        return False
    context = CONTEXT.at(FIRST_PRECISION)
    exact = Fraction(reference.strip())
    gap = abs(context.mpf(exact.numerator) / exact.denominator - value)
    return bool(gap * 2 <= context.mpf(10) ** -len(found["decimals"]))


def agree(one: Expression, other: Expression) -> bool:
    """Returns whether both are equal numbers, or equal functions of their symbols; False if that cannot be decided."""
    names = sorted(symbols(one) | symbols(other))
    try:
        if not names:
            left, right = rational(one), rational(other)
            if left is not None and right is not None:
                return left == right
            return is_same_number(one, other)
        return is_same_function(one, other, names, False) or (
            SYMBOL_I in names and is_same_function(one, other, names, True)
        )
    except (Undefined, TooCostly):
        return False


def is_same_number(one: Expression, other: Expression) -> bool:
    """Returns whether both have the same value. Raises Undefined or TooCostly."""
    return are_close(compute_both(one, other, {}))


def are_close(values: Values) -> bool:
    left, right = values.left, values.right
    if not (isfinite(left) and isfinite(right)):
        return bool(left == right)
    return bool(abs(left - right) <= max(abs(left), abs(right)) * values.tolerance)


def isfinite(value: Value) -> bool:
    return bool(value.context.isfinite(value.real) and value.context.isfinite(value.imag))


@dataclass(slots=True, frozen=True)
class Values:
    left: Value
    right: Value
    tolerance: Value  # largest relative difference that rounding can cause
    are_real: bool  # True if every part of the two expressions is real


def compute_both(one: Expression, other: Expression, environment: Mapping[str, Fraction | complex]) -> Values:
    """Errors: Undefined, TooCostly."""
    precision = FIRST_PRECISION
    while True:
        context = CONTEXT.at(precision)
        evaluator = Evaluator(precision, {name: as_value(context, at) for name, at in environment.items()}, context)
        left, right = evaluator.value(one), evaluator.value(other)
        magnitudes = evaluator.highest - evaluator.lowest
        needed = 4 * magnitudes + 300
        if needed <= precision:
            tolerance = context.mpf(2) ** -(2 * magnitudes + AGREEMENT)
            return Values(left, right, tolerance, not evaluator.has_left_reals)
        if needed > MAX_PRECISION:
            raise TooCostly("more digits than are computed")
        precision = needed


def as_value(context: MPContext, at: Fraction | complex) -> Value:
    if isinstance(at, complex):
        return context.mpc(0, 1)
    return context.mpf(at.numerator) / at.denominator


def environments(names: Sequence[str], is_imaginary: bool) -> Iterator[dict[str, Fraction | complex]]:
    """Yields points to compare at. Whole numbers come last, for expressions without a value elsewhere: (-1)^n."""
    free = [name for name in names if not (is_imaginary and name == SYMBOL_I)]
    imaginary: dict[str, Fraction | complex] = {SYMBOL_I: 1j} if is_imaginary else {}
    for row, signs in zip(POINT_ROWS, SIGN_ROWS, strict=True):
        yield imaginary | {
            name: Fraction(signs[place % len(signs)] * (row[place % len(row)] + place // len(row)), POINT_UNIT)
            for place, name in enumerate(free)
        }
    for row in WHOLE_ROWS:
        yield imaginary | {name: Fraction(row[place % len(row)]) for place, name in enumerate(free)}


def is_same_function(one: Expression, other: Expression, names: Sequence[str], is_imaginary: bool) -> bool:
    """Returns whether both are equal at NUM_POINTS points or more and different at none. Raises TooCostly."""
    num_equal = 0
    for environment in environments(names, is_imaginary):
        try:
            values = compute_both(one, other, environment)
        except Undefined:
            continue
        if are_close(values):
            num_equal += 1
        elif is_imaginary or values.are_real:
            return False
        if num_equal and names == [SYMBOL_I] and is_imaginary:
            return True
    return num_equal >= NUM_POINTS


def constant_ratio(one: Expression, other: Expression) -> Ratio:
    """Returns the sign of one / other if the ratio is the same number at all points; None otherwise.

    With such a ratio, `one = 0` and `other = 0` are the same equation; if the sign is positive, `one > 0` and
    `other > 0` are also the same inequality.
    """
    names = sorted(symbols(one) | symbols(other))
    if symbols(one) != symbols(other) or not names:
        return None
    ratio: Value = None
    num_equal = 0
    for environment in environments(names, is_imaginary=False):
        try:
            values = compute_both(one, other, environment)
        except Undefined:
            continue
        except TooCostly:
            return None
        left, right = values.left, values.right
        if not (isfinite(left) and isfinite(right) and values.are_real):
            continue
        if not left or not right:
            return None
        if ratio is None:
            ratio = left.real / right.real
        elif abs(left.real / right.real - ratio) > abs(ratio) * 2 ** (-AGREEMENT / 2):
            return None
        num_equal += 1
        if num_equal == NUM_POINTS + 1:
            return "positive" if ratio > 0 else "negative"
    return None


def linear_root(expression: Expression) -> Expression | None:
    """Returns the exact zero of an expression that is linear in its only symbol; None for other expressions."""
    names = symbols(expression)
    if len(names) != 1:
        return None
    (name,) = names
    values = []
    for at in (0, 1, 2):
        try:
            value = rational(replace_symbol(expression, name, Expression("number", value=Fraction(at))))
        except Undefined:
            return None
        if value is None:
            return None
        values.append(value)
    slope = values[1] - values[0]
    if not slope or values[2] - values[1] != slope:
        return None
    # Three points can lie on a line for a non-linear function too, so the expression is evaluated at the zero.
    root = Expression("number", value=-values[0] / slope)
    line = difference(expression, Expression("multiply", (Expression("number", value=slope), difference(
        Expression("symbol", name=name), root))))  # fmt: skip
    return root if agree(line, Expression("number")) or is_zero_function(line) else None


def is_zero_function(expression: Expression) -> bool:
    names = sorted(symbols(expression))
    num_zeros = 0
    for environment in environments(names, is_imaginary=False):
        try:
            value = compute_both(expression, Expression("number"), environment).left
        except (Undefined, TooCostly):
            return False
        if abs(value) > 2.0**-AGREEMENT:
            return False
        num_zeros += 1
    return num_zeros > NUM_POINTS


def replace_symbol(expression: Expression, name: str, value: Expression) -> Expression:
    if expression.operation == "symbol":
        return value if expression.name == name else expression
    if not expression.operands:
        return expression
    operands = tuple(replace_symbol(operand, name, value) for operand in expression.operands)
    return Expression(expression.operation, operands, expression.value, expression.name)


def number_value(expression: Expression) -> Value | None:
    """Returns the floating-point value of an expression without symbols; None if it has no value."""
    try:
        value = compute_both(expression, Expression("number"), {}).left
    except (Undefined, TooCostly):
        return None
    return value


@functools.lru_cache(maxsize=1024)
def order_key(text: str) -> float | None:
    """Returns the real value of an interval's end, for sorting; None if it has symbols or no real value."""
    try:
        expression = parse_expression(text)
    except NotAnExpression:
        return None
    if symbols(expression):
        return None
    value = number_value(expression)
    return None if value is None or value.imag else float(value.real)


def short_value(text: str) -> str | None:
    """Returns an exact fraction, or thirty digits of another number; None if those do not suffice or cost too much."""
    try:
        expression = parse_expression(text)
        if symbols(expression):
            return None
        if (exact := rational(expression)) is not None:
            return f"number {exact.numerator:x}/{exact.denominator:x}"  # hexadecimal has no limit on its length
        context = CONTEXT.at(FIRST_PRECISION)
        evaluator = Evaluator(FIRST_PRECISION, {}, context)
        value = evaluator.value(expression)
    except (NotAnExpression, Undefined, TooCostly):
        return None
    if evaluator.highest - evaluator.lowest > AGREEMENT or not isfinite(value):
        return None
    return f"value {context.nstr(value, 30)}"
