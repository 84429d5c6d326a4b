"""Evaluates expressions: as exact fractions if all parts are rational, else in floating point of any precision.

The limits MAX_BITS on exact integers and MAX_PRECISION on precisions bound the time of every evaluation.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from mpmath.ctx_mp import MPContext

from megatron_oreal.rewards.expression import Expression

MAX_BITS = 200_000  # of an exact numerator or denominator
MAX_PRECISION = 60_000  # bits
MAX_ARGUMENT = 10_000  # of exact factorials and binomials
FIRST_PRECISION = 320

Value = Any  # mpf, mpc: mpmath has no types


class Undefined(ValueError):
    """Signals that an expression has no value, such as 1/0."""


class TooCostly(ValueError):
    """Signals that a value exceeds the size limits."""


def rational(expression: Expression) -> Fraction | None:
    """Returns the exact value; None if it is not a fraction, not known to be one, or too large. Raises Undefined."""
    operation = expression.operation
    if operation == "number":
        return expression.value
    if operation in ("symbol", "pi", "e", "infinity"):
        return None
    values: list[Fraction] = []
    for operand in expression.operands:
        value = rational(operand)
        if value is None:
            return None
        values.append(value)
    compute = EXACT.get(operation)
    result = compute(*values) if compute is not None else None
    return result if result is None or size(result) <= MAX_BITS else None


def size(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())


def exact_sum(*values: Fraction) -> Fraction | None:
    total = Fraction(0)
    for value in values:
        if size(total) + size(value) > MAX_BITS:
            return None
        total += value
    return total


def exact_product(*values: Fraction) -> Fraction | None:
    total = Fraction(1)
    for value in values:
        if size(total) + size(value) > MAX_BITS:
            return None
        total *= value
    return total


def exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return exact_root(base, Fraction(exponent.denominator), exponent.numerator)
    if base == 0 and exponent < 0:
        raise Undefined("a division by zero")
    if abs(base) == 1 or base == 0:
        return base ** int(exponent % 2) if base else Fraction(int(exponent == 0))
    if size(base) * abs(exponent) > MAX_BITS:
        return None
    return base ** int(exponent)


def exact_root(base: Fraction, index: Fraction, times: int = 1) -> Fraction | None:
    """Returns the real root if it is a fraction, else None."""
    if index.denominator != 1 or not 1 <= index <= 64:
        return None
    degree = int(index)
    if base < 0 and degree % 2 == 0:
        return None
    roots = [integer_root(abs(part), degree) for part in (base.numerator, base.denominator)]
    if roots[0] is None or roots[1] is None:
        return None
    root = Fraction(roots[0], roots[1])
    return exact_power(-root if base < 0 else root, Fraction(times))


def integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    elif value.bit_length() > 2000:
        return None
    else:
        low, high = 0, 1 << (value.bit_length() // degree + 1)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if middle**degree <= value else (low, middle - 1)
        root = low
    return root if root**degree == value else None


def exact_factorial(value: Fraction) -> Fraction | None:
    if value.denominator != 1 or value < 0:
        return None
    return Fraction(math.factorial(int(value))) if value <= MAX_ARGUMENT else None


def exact_binomial(upper: Fraction, lower: Fraction) -> Fraction | None:
    if upper.denominator != 1 or lower.denominator != 1 or not 0 <= upper <= MAX_ARGUMENT:
        return None
    return Fraction(math.comb(int(upper), int(lower))) if lower >= 0 else Fraction(0)


def exact_permutations(upper: Fraction, lower: Fraction) -> Fraction | None:
    if upper.denominator != 1 or lower.denominator != 1 or not 0 <= lower <= upper <= MAX_ARGUMENT:
        return None
    return Fraction(math.perm(int(upper), int(lower)))


def of_integers(compute: Callable[..., int]) -> Callable[..., Fraction | None]:
    def exact(*values: Fraction) -> Fraction | None:
        whole = all(value.denominator == 1 for value in values)
        return Fraction(compute(*map(int, values))) if whole else None

    return exact


EXACT: dict[str, Callable[..., Fraction | None]] = {
    "add": exact_sum,
    "multiply": exact_product,
    "power": exact_power,
    "root": exact_root,
    "factorial": exact_factorial,
    "binom": exact_binomial,
    "permutations": exact_permutations,
    "abs": abs,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceiling": lambda value: Fraction(math.ceil(value)),
    "max": max,
    "min": min,
    "gcd": of_integers(math.gcd),
    "lcm": of_integers(math.lcm),
    "Re": lambda value: value,
}


def symbols(expression: Expression) -> frozenset[str]:
    if expression.operation == "symbol":
        return frozenset((expression.name,))
    return frozenset().union(*map(symbols, expression.operands))


def has_logarithm_without_base(expression: Expression) -> bool:
    return expression.operation == "log" or any(map(has_logarithm_without_base, expression.operands))


class ThreadContext(threading.local):
    """Holds one mpmath context per thread, because making one takes longer than most evaluations."""

    def __init__(self) -> None:
        self.context = MPContext()

    def at(self, precision: int) -> MPContext:
        """Returns a context of this precision; it is valid until the next call."""
        self.context.prec = precision
        return self.context


CONTEXT = ThreadContext()


class Evaluator:
    """Computes floating-point values at one precision; records the largest and smallest magnitudes, in bits."""

    def __init__(self, precision: int, environment: Mapping[str, Value], context: MPContext) -> None:
        self.context = context
        self.precision = precision
        self.environment = environment
        self.lowest = self.highest = 0
        self.has_left_reals = False

    def value(self, expression: Expression) -> Value:
        """Errors: Undefined, TooCostly."""
        try:
            result = self.compute(expression)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError) as error:
            if isinstance(error, (Undefined, TooCostly)):
                raise
            raise Undefined(str(error)) from None
        self.note(result)
        return result

    def note(self, value: Value) -> None:
        self.has_left_reals = self.has_left_reals or bool(value.imag)
        for part in (value.real, value.imag):
            if not self.context.isfinite(part):
                if self.context.isnan(part):
                    raise Undefined("not a number")
            elif part:
                magnitude = self.context.mag(part)
                if abs(magnitude) > MAX_PRECISION:
                    raise TooCostly("a magnitude beyond the limit")
                self.lowest = min(self.lowest, magnitude)
                self.highest = max(self.highest, magnitude)

    def compute(self, expression: Expression) -> Value:
        context, operation = self.context, expression.operation
        if operation == "number":
            return context.mpf(expression.value.numerator) / expression.value.denominator
        if operation == "symbol":
            return self.environment[expression.name]
        if operation in CONSTANTS:
            return CONSTANTS[operation](context)
        if operation == "power":
            return self.power(*expression.operands)
        if operation == "root":
            return self.root(self.value(expression.operands[0]), rational(expression.operands[1]))
        values = [self.value(operand) for operand in expression.operands]
        if operation == "add":
            return self.sum(values)
        if operation == "multiply":
            return context.fprod(values)
        if operation not in FLOATING:
            raise Undefined(f"no function {operation}")
        return self.without_noise(context.mpmathify(FLOATING[operation](context, *values)), values)

    def without_noise(self, result: Value, arguments: list[Value]) -> Value:
        """Replaces parts far below the precision by zero, such as sin(pi) and the real part of exp(i pi/2)."""
        context = self.context
        scale = min([abs(argument) for argument in arguments if argument] or [context.one])
        smallest = min(scale, context.one) * context.mpf(2) ** (60 - self.precision)
        if not context.isfinite(abs(result)):
            return result
        smallest = max(smallest, abs(result) * context.mpf(2) ** (60 - self.precision)) if result.imag else smallest
        real, imaginary = (part if abs(part) > smallest else context.zero for part in (result.real, result.imag))
        return context.mpc(real, imaginary) if imaginary else real

    def sum(self, values: list[Value]) -> Value:
        """Sums the terms; a result after cancellation that is within rounding error becomes zero."""
        total = self.context.fsum(values)
        largest = max(map(abs, values))
        if abs(total) < largest * self.context.mpf(2) ** (40 - self.precision):
            return self.context.mpf(0)
        return total

    def power(self, base: Expression, exponent: Expression) -> Value:
        exact = rational(exponent)
        if exact is None:
            value = self.value(base)
            if base.operation != "e" and not value:
                raise Undefined("a power of zero")
            top = self.value(exponent)
            self.check_power(value, top)
            return self.without_noise(self.context.power(value, top), [value, top])
        value = self.value(base)
        self.check_power(value, exact)
        if exact.denominator == 1:
            return value ** int(exact)
        if value.imag == 0 and value.real < 0 and exact.denominator % 2 and "i" not in self.environment:
            root = -self.context.root(-value.real, exact.denominator) if exact.denominator < MAX_ARGUMENT else None
            if root is None:
                raise TooCostly("a root beyond the limit")
            return root**exact.numerator
        return self.without_noise(
            self.context.power(value, self.context.mpf(exact.numerator) / exact.denominator), [value]
        )

    def check_power(self, base: Value, exponent: Value | Fraction) -> None:
        if not base or not self.context.isfinite(abs(base)):
            return
        scale = abs(self.context.mag(base)) + 1
        if scale * float(abs(exponent.real)) > MAX_PRECISION:
            raise TooCostly("a power beyond the limit")

    def root(self, value: Value, index: Fraction | None) -> Value:
        if index is None or index.denominator != 1 or not 1 <= index <= MAX_ARGUMENT:
            raise Undefined("a root without a whole index")
        if value.imag == 0 and value.real < 0 and index % 2:
            return -self.context.root(-value.real, int(index))
        return self.without_noise(self.context.root(value, int(index)), [value])


def real_argument(compute: Callable[[Any, Value], Value]) -> Callable[[Any, Value], Value]:
    def apply(context: Any, value: Value) -> Value:
        if value.imag:
            raise Undefined("a complex argument")
        return compute(context, value.real)

    return apply


def bounded(compute: Callable[..., Value]) -> Callable[..., Value]:
    def apply(context: Any, *values: Value) -> Value:
        if any(abs(value) > MAX_ARGUMENT for value in values):
            raise TooCostly("an argument beyond the limit")
        return compute(context, *values)

    return apply


def exponential(context: Any, value: Value) -> Value:
    if abs(value.real) > MAX_PRECISION / 2:
        raise TooCostly("an exponential beyond the limit")
    return context.exp(value)


CONSTANTS: dict[str, Callable[[Any], Value]] = {
    "pi": lambda context: +context.pi,
    "e": lambda context: +context.e,
    "infinity": lambda context: context.mpf("inf"),
}
FLOATING: dict[str, Callable[..., Value]] = {
    **{
        name: bounded(lambda context, value, name=name: getattr(context, name)(value))
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "coth")
    },
    "arcsin": lambda context, value: context.asin(value),
    "arccos": lambda context, value: context.acos(value),
    "arctan": lambda context, value: context.atan(value),
    "arccot": lambda context, value: context.acot(value),
    "exp": exponential,
    "ln": lambda context, value: context.ln(value),
    "log": lambda context, value: context.ln(value) / context.ln(10),
    "lg": lambda context, value: context.ln(value) / context.ln(10),
    "abs": lambda context, value: abs(value),
    "arg": lambda context, value: context.arg(value),
    "conj": lambda context, value: context.conj(value),
    "Re": lambda context, value: value.real,
    "Im": lambda context, value: value.imag,
    "sgn": real_argument(lambda context, value: context.sign(value)),
    "floor": real_argument(lambda context, value: context.floor(value)),
    "ceiling": real_argument(lambda context, value: context.ceil(value)),
    "factorial": bounded(lambda context, value: context.factorial(value)),
    "binom": bounded(lambda context, upper, lower: context.binomial(upper, lower)),
    "permutations": bounded(lambda context, upper, lower: context.ff(upper, lower)),
    "max": lambda context, *values: max(value.real for value in values),
    "min": lambda context, *values: min(value.real for value in values),
}
