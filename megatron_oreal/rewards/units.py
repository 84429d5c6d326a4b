r"""Parses units, currencies, counted nouns and scale words after or before a value: `12 \text{cm}^2`, `\text{Rs} 5`.

A unit is optional, because the question fixes it; two units must be the same. The list of units is closed: other text
after a value is part of the answer, except one plain noun for the counted things (`5 \text{apples}`).
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_oreal.rewards.vocabulary import (
    ADJECTIVES,
    IGNORED_WORDS,
    LEADING_WORDS,
    NOT_IN_UNITS,
    NOT_NOUNS,
    word_set,
)

SI_SYMBOLS = {
    "m": "meter", "g": "gram", "s": "second", "L": "liter", "l": "liter", "N": "newton", "J": "joule", "W": "watt",
    "V": "volt", "A": "ampere", "Hz": "hertz", "Pa": "pascal", "K": "kelvin", "mol": "mole", "cal": "calorie",
    "eV": "electronvolt", "B": "byte", "bit": "bit", "Wh": "watthour", "T": "tesla", "F": "farad", "bar": "bar",
}  # fmt: skip
SI_PREFIXES = {"k": "kilo", "c": "centi", "m": "milli", "d": "deci", "M": "mega", "G": "giga", "u": "micro",
               "n": "nano", "h": "hecto", "p": "pico"}  # fmt: skip
SI_NAMES = {name: name for name in SI_SYMBOLS.values()} | {
    "metre": "meter", "litre": "liter", "sec": "second", "amp": "ampere", "gramme": "gram", "ohm": "ohm",
}  # fmt: skip
OTHER_UNITS = {
    "in": "inch", "inch": "inch", "ft": "foot", "foot": "foot", "yd": "yard", "yard": "yard", "mi": "mile",
    "mile": "mile", "oz": "ounce", "ounce": "ounce", "lb": "pound", "pound": "pound", "ton": "ton", "tonne": "tonne",
    "gal": "gallon", "gallon": "gallon", "qt": "quart", "quart": "quart", "pt": "pint", "pint": "pint", "acre": "acre",
    "ha": "hectare", "hectare": "hectare", "min": "minute", "minute": "minute", "h": "hour", "hr": "hour",
    "hour": "hour", "day": "day", "wk": "week", "week": "week", "mo": "month", "month": "month", "yr": "year",
    "year": "year", "deg": "degree", "degree": "degree", "rad": "radian", "radian": "radian", "dollar": "dollar",
    "usd": "dollar", "buck": "dollar", "cent": "cent", "euro": "euro", "eur": "euro", "sterling": "pound",
    "gbp": "pound", "pence": "penny", "penny": "penny", "yen": "yen", "jpy": "yen", "yuan": "yen", "rmb": "yen",
    "rupee": "rupee", "rs": "rupee", "re": "rupee", "inr": "rupee", "won": "won", "ruble": "ruble", "peso": "peso",
    "franc": "franc", "celsius": "celsius", "centigrade": "celsius", "fahrenheit": "fahrenheit", "knot": "knot",
    "am": "a.m.", "pm": "p.m.", "bc": "B.C.", "bce": "B.C.", "ad": "A.D.", "ce": "A.D.", "unit": "unit",
    "person": "person", "people": "person", "point": "point", "pts": "point", "sq": "sq", "元": "yen", "个": "piece",
    "米": "meter", "厘米": "centimeter", "千米": "kilometer", "公里": "kilometer", "千克": "kilogram", "小时": "hour",
    "分钟": "minute", "秒": "second", "天": "day", "度": "degree", "円": "yen", "原": "won", "岁": "year", "年": "year",
    "平方厘米": "square centimeter", "平方米": "square meter", "人": "person",
}  # fmt: skip
IRREGULAR_PLURALS = {"feet": "foot", "inches": "inch", "men": "man", "women": "woman", "children": "child",
                     "people": "person", "geese": "goose", "mice": "mouse", "dice": "die", "lbs": "lb",
                     "pence": "penny", "centuries": "century", "halves": "half", "loaves": "loaf", "knives": "knife",
                     "vertices": "vertex"}  # fmt: skip
COMPOUND_UNITS = {"mph": (("mile", 1), ("hour", -1)), "kmh": (("kilometer", 1), ("hour", -1)),
                  "kph": (("kilometer", 1), ("hour", -1)), "fps": (("foot", 1), ("second", -1)),
                  "cc": (("centimeter", 3),), "sqm": (("meter", 2),), "sqft": (("foot", 2),)}  # fmt: skip
CURRENCIES = word_set("dollar cent euro pound penny yen rupee won ruble peso franc")
MULTIPLIERS = {
    "ten": Fraction(10), "hundred": Fraction(100), "thousand": Fraction(1000), "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12), "quadrillion": Fraction(10**15), "dozen": Fraction(12),
    "k": Fraction(1000), "half": Fraction(1, 2),
    "third": Fraction(1, 3), "quarter": Fraction(1, 4), "fourth": Fraction(1, 4), "fifth": Fraction(1, 5),
    "sixth": Fraction(1, 6), "seventh": Fraction(1, 7), "eighth": Fraction(1, 8), "ninth": Fraction(1, 9),
    "tenth": Fraction(1, 10), "hundredth": Fraction(1, 100), "thousandth": Fraction(1, 1000),
    "millionth": Fraction(1, 10**6), "permille": Fraction(1, 1000),
}  # fmt: skip
DEGREE_SCALES = {"C": "celsius", "F": "fahrenheit", "K": "kelvin"}

Factors = tuple[tuple[str, int], ...]


@dataclass(slots=True, frozen=True)
class Quantity:
    r"""A value with its unit. `12 \text{km}` has value "12", unit (("kilometer", 1),), scale 1; no unit is None."""

    value: str  # LaTeX
    unit: Factors | None
    scale: Fraction = Fraction(1)  # of `million`, `dozen`, `halves`


def singular(word: str) -> str:
    if word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes")):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


@functools.lru_cache(maxsize=1024)
def unit_of_word(word: str) -> Factors | None:
    """Returns a unit of the closed list, with its prefix; case matters for symbols only."""
    if word in SI_SYMBOLS:
        return ((SI_SYMBOLS[word], 1),)
    if word[:1] in SI_PREFIXES and word[1:] in SI_SYMBOLS and word not in OTHER_UNITS and len(word) > 1:
        return ((SI_PREFIXES[word[0]] + SI_SYMBOLS[word[1:]], 1),)
    for name in (word.lower(), singular(word.lower())):
        if name in COMPOUND_UNITS:
            return COMPOUND_UNITS[name]
        if name in OTHER_UNITS:
            return ((OTHER_UNITS[name], 1),)
        if name in SI_NAMES:
            return ((SI_NAMES[name], 1),)
        for prefix in SI_PREFIXES.values():
            if name.startswith(prefix) and name[len(prefix) :] in SI_NAMES:
                return ((prefix + SI_NAMES[name[len(prefix) :]], 1),)
    return None


def is_unit_word(word: str) -> bool:
    """Returns whether a plain word of two or more letters is a unit or scale word that can follow a number."""
    lower = word.lower()
    if len(word) < 2 or (lower in ("re", "in", "pt", "mo", "ce", "ad", "mm") and lower not in ("mm", "in")):
        return False
    return lower in ("sq", "square", "cubic", "cu") or unit_of_word(word) is not None or singular(lower) in MULTIPLIERS


TAIL_TOKEN = re.compile(
    r"\\text\{(?P<words>[^{}]*)\}|\^(?P<digit>\d)|\^\{(?P<exponent>-?\d)\}|(?P<slash>/)|(?P<dot>\\cdot)|(?P<degree>\^\\circ)"
    r"|(?P<open>\()|(?P<close>\))| "
)
TEXT_NEXT = re.compile(r"\s*\\text")
MAX_TAIL_TOKENS = 32  # no unit has more tokens; the limit makes the time linear in the text
TAIL_START = re.compile(
    r"/ ?\\text\{|\\text\{|\^\\circ|\\cdot ?\\text\{|\\frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*\}\}$"
)
UNIT_FRACTION = re.compile(r"\\frac\{(\\text\{[^{}]*\}(?:\^\d)?)\}\{(\\text\{[^{}]*\}(?:\^\d)?)\}")
LEADING_TEXT = re.compile(r"(?P<sign>-?) ?\\text\{(?P<words>[^{}]*)\}\.? ?(?P<rest>.+)", re.DOTALL)
ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
APPROXIMATE = re.compile(r"(?:\\approx|\\sim|\\thickapprox)(?![a-zA-Z]) ?")


class NotAUnit(ValueError):
    """Signals that the text after a value is not a unit but part of the answer."""


def parse_quantity(text: str) -> Quantity:
    """Returns value and unit of a normalised answer; without a unit, the value is the whole text."""
    text = APPROXIMATE.sub("", text, count=1) if APPROXIMATE.match(text) else text
    leading: Factors = ()
    if found := LEADING_TEXT.fullmatch(text):
        words = found["words"].lower().split()
        units = [unit_of_word(word) for word in words]
        is_currency = all(unit is not None and unit[0][0] in CURRENCIES for unit in units)
        if is_currency or all(word in LEADING_WORDS for word in words):
            leading = (units[0] or ()) if is_currency and units else ()
            text = found["sign"] + found["rest"]
    text = UNIT_FRACTION.sub(r"\1/\2", text)
    begin = len(text) - len(text.lstrip())
    function = ANGLE_FUNCTION.search(text)
    depth, end = 0, 0  # depth: of brackets before `end`, so that no candidate rescans the text before it
    for start in TAIL_START.finditer(text):
        depth += depth_change(text[end : start.start()])
        end = start.start()
        is_argument = start[0].startswith("^") and function is not None and function.end() <= end
        if end > begin and depth == 0 and not is_argument:
            try:
                multiplier, factors = parse_tail(text, end)
            except NotAUnit:
                continue
            return Quantity(text[:end].strip(), merge([*leading, *factors]) or None, multiplier)
    return Quantity(text, leading or None)


def depth_change(text: str) -> int:
    return sum(text.count(mark) for mark in "{([") - sum(text.count(mark) for mark in "})]")


def parse_tail(text: str, start: int = 0) -> tuple[Fraction, list[tuple[str, int]]]:
    """Returns scale and units of the text after a value, which begins at `start`. Raises NotAUnit."""
    multiplier, factors = Fraction(1), []
    sign, power = 1, 1  # of the next unit
    end = start
    for _ in range(MAX_TAIL_TOKENS):
        if end == len(text):
            break
        found = TAIL_TOKEN.match(text, end)
        if found is None:
            raise NotAUnit
        end = found.end()
        if found["slash"]:
            sign = -1
        elif found["dot"]:
            if not TEXT_NEXT.match(text, end):
                raise NotAUnit
        elif found["degree"]:
            factors.append(("degree", 1))
        elif exponent := (found["digit"] or found["exponent"]):
            if not factors or exponent == "0":
                raise NotAUnit
            factors[-1] = (factors[-1][0], factors[-1][1] * int(exponent))
        elif found["words"] is not None:
            words = found["words"].replace("per mille", "permille").split()
            for position, word in enumerate(words):
                lower = word.lower()
                if lower == "per" or (lower in ("a", "an") and factors and position):
                    sign = -1
                elif lower in ("square", "sq") and position < len(words) - 1:
                    power = 2
                elif lower in ("cubic", "cu") and position < len(words) - 1:
                    power = 3
                elif lower in ("squared", "cubed") and factors and factors[-1][0] != "count":
                    factors[-1] = (factors[-1][0], factors[-1][1] * (2 if lower == "squared" else 3))
                elif singular(lower) in MULTIPLIERS and not factors and sign == 1:
                    multiplier *= MULTIPLIERS[singular(lower)]
                else:
                    factors += [(name, sign * power * count) for name, count in word_factors(word, factors, words)]
                    sign, power = 1, 1
    if sign == -1 or power != 1 or end < len(text):
        raise NotAUnit
    if factors and factors[0] == ("degree", 1) and len(factors) > 1 and factors[1][0] in DEGREE_SCALES.values():
        del factors[0]
    return multiplier, factors


def word_factors(word: str, before: list[tuple[str, int]], words: list[str]) -> Factors:
    """Returns the factors of a unit or noun. Raises NotAUnit for other words."""
    lower = word.lower()
    if before and before[-1][0] == "degree" and word in DEGREE_SCALES:
        return ((DEGREE_SCALES[word], 1),)
    if lower == "pounds" and "sterling" in words:
        return ()
    if (before and lower in IGNORED_WORDS) or (lower in ADJECTIVES and word != words[-1]):
        return ()
    if (unit := unit_of_word(word)) is not None:
        return unit
    if lower in NOT_NOUNS or (before and before[-1][1] > 0) or not word.isalpha():
        raise NotAUnit
    # A short name is a symbol or a prefix, and an ordinal is a fraction (twelfths), so neither is a noun.
    if len(word) <= 2 if word.isascii() else not NOT_IN_UNITS.isdisjoint(word):
        raise NotAUnit
    if singular(lower).endswith("th"):
        raise NotAUnit
    return ((singular(lower), 1),)


def merge(factors: list[tuple[str, int]]) -> Factors:
    totals: dict[str, int] = {}
    for name, count in factors:
        square = name.removeprefix("square ")
        totals[square] = totals.get(square, 0) + count * (2 if square != name else 1)
    return tuple(sorted((name, count) for name, count in totals.items() if count))


def units_agree(prediction: Factors | None, reference: Factors | None) -> bool:
    """Returns whether units agree: either side may have no unit, and "units" matches any unit of that power."""
    if prediction is None:
        return True
    if reference is None:
        return ("B.C.", 1) not in prediction
    if prediction == reference:
        return True
    for one, other in ((prediction, reference), (reference, prediction)):
        if len(one) == 1 and one[0][0] == "unit" and other[0][0] not in CURRENCIES:
            return len(other) == 1 and one[0][1] in (1, other[0][1])
    return False
