r"""Parses plain numbers in normalised LaTeX exactly: integers, decimals, fractions, powers, percentages, e-notation."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from megatron_oreal.rewards.spelling import CACHE_SIZE

MAX_CHARACTERS = 1000
MAX_EXPONENT = 1000  # limit of the exact arithmetic here

# The grammar of plain numbers. Every repetition is over a single character class, which bounds backtracking.
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
POWER = rf"{DECIMAL}(?:\s*\^\s*(?:-?\d|\{{\s*-?\d{{1,6}}\s*\}}))?"
SIGNED = rf"[+-]?\s*{POWER}"
NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?\\frac\s*\{{\s*(?P<over>{SIGNED})\s*\}}\s*\{{\s*(?P<under>{SIGNED})\s*\}}"
    rf"|(?:(?P<plain_whole>\d+)\s+)?(?P<plain_over>{POWER})\s*/\s*(?P<plain_under>{POWER})"
    rf"|(?P<factor>{DECIMAL})\s*(?:\\cdot|x)\s*(?P<scale>10\s*\^\s*(?:-?\d|\{{\s*-?\d{{1,6}}\s*\}}))"
    r"|(?P<mantissa>\d+(?:\.\d+)?)[eE](?P<exponent>[+-]?\d{1,4})"
    rf"|(?P<single>{POWER})"
    r")\s*(?P<percent>\\%)?"
)


@functools.lru_cache(maxsize=CACHE_SIZE)  # the samples of a group often repeat an answer
def parse_number(normalized: str) -> Fraction | None:
    r"""Returns the exact value of a plain number, `\%` included.

    Returns None for other text, for a division by zero, and for exponents beyond `MAX_EXPONENT`.
    """
    if len(normalized) > MAX_CHARACTERS or not (found := NUMBER.fullmatch(normalized)):
        return None
    try:
        value = magnitude(found)
    except (ZeroDivisionError, OverflowError):
        return None
    value /= 100 if found["percent"] else 1
    return -value if found["sign"] == "-" else value


def magnitude(found: re.Match[str]) -> Fraction:
    """Returns the value without sign and percent. Raises ZeroDivisionError or OverflowError."""
    if found["single"]:
        return power(found["single"])
    if found["mantissa"]:
        return power(found["mantissa"]) * power(f"10^{found['exponent'].lstrip('+')}")
    if found["factor"]:
        return power(found["factor"]) * power(found["scale"])
    if found["plain_over"]:
        return Fraction(found["plain_whole"] or 0) + power(found["plain_over"]) / power(found["plain_under"])
    return Fraction(found["whole"] or 0) + power(found["over"]) / power(found["under"])


def power(text: str) -> Fraction:
    base, _, exponent_text = text.replace(",", "").replace(" ", "").partition("^")
    exponent = int(exponent_text.strip("{}") or 1)
    # A base has at most 1000 characters, so the power has less than a million digits.
    if abs(exponent) > MAX_EXPONENT or (abs(exponent) > 1 and len(base) > 20):
        raise OverflowError
    sign, base = (-1, base[1:]) if base.startswith("-") else (1, base.lstrip("+"))
    return sign * Fraction(base if not base.endswith(".") else base[:-1]) ** exponent


# 2e-5 can also mean 2e - 5 with Euler's number.
AMBIGUOUS_E = re.compile(r"(?<![a-zA-Z\d.])(\d+)e-(\d)(?!\d)")
EULER = re.compile(r"(?<![a-zA-Z\d\\])e(?![a-zA-Z])|(?<=\d)e(?![-+\d])|\\exp(?![a-zA-Z])")


def spell_out_eulers_number(text: str, other: str) -> str:
    """Rewrites `2e-5` as `2e - 5` if the other answer also has Euler's number."""
    return AMBIGUOUS_E.sub(r"\1 e - \2", text) if EULER.search(other) else text
