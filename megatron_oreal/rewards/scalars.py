"""Decides whether two expressions or words are the same; the algebra system comes last."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_oreal.rewards.algebra_needed import Algebra
from megatron_oreal.rewards.plain_numbers import parse_number
from megatron_oreal.rewards.spelling import TEXT, without_spaces
from megatron_oreal.rewards.units import SI_SYMBOLS, Factors
from megatron_oreal.rewards.words import same_word, segments

BASED_NUMERAL = re.compile(
    r"(?:\\text\{)?(?P<digits>[0-9A-F]+)\}?(?:_(?:(?P<base>\d)|\{\s*(?P<braced_base>\d{1,2})\s*\}))?"
)
PLAIN_UNIT_SYMBOL = re.compile(r"(?P<value>.*[\d})])(?P<space> ?)(?P<symbol>[a-zA-Z])(?:\^(?P<power>[23]))?")
DEGREES: Factors = (("degree", 1),)
RADIANS: Factors = (("radian", 1),)


def spelled_alike(prediction: str, reference: str) -> bool:
    """Compares spellings without spaces, except the space that distinguishes the list 1, 234 from 1,234."""
    if without_spaces(prediction) != without_spaces(reference):
        return False
    return "," not in prediction or (parse_number(prediction) is None) == (parse_number(reference) is None)


def same_scalar(prediction: str, reference: str, algebra: Algebra) -> bool:
    """Returns whether two expressions or words are the same."""
    if spelled_alike(prediction, reference):
        return True
    values = parse_number(prediction), parse_number(reference)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    bare, plain_unit = split_plain_unit(prediction, reference)
    if plain_unit is not None:
        return same_scalar(bare, reference, algebra)
    numerals = BASED_NUMERAL.fullmatch(prediction), BASED_NUMERAL.fullmatch(reference)
    if numerals[0] and numerals[1]:
        bases = {found["base"] or found["braced_base"] for found in numerals if found} - {None}
        digits = numerals[1]["digits"]
        is_numeral = all(int(digit, 16) < int(base) for digit in digits for base in bases if base)
        return numerals[0]["digits"] == digits and len(bases) < 2 and is_numeral
    words = same_word(prediction, reference)
    if words is not None:
        return words
    if single_letters_agree(prediction, reference):
        return True
    if TEXT.search(prediction) or TEXT.search(reference):
        return same_segments(prediction, reference, algebra)
    return algebra.equal(prediction, reference)


def single_letters_agree(prediction: str, reference: str) -> bool:
    letters = TEXT.sub(r"\1", prediction).strip(), TEXT.sub(r"\1", reference).strip()
    return all(len(text) == 1 and text.isalpha() for text in letters) and letters[0].lower() == letters[1].lower()


def same_segments(prediction: str, reference: str, algebra: Algebra) -> bool:
    r"""Compares alternating text and mathematics part by part: `5 \text{ft} 3 \text{in}`, `\text{May} 5`."""
    mathematics, texts = segments(prediction)
    expected_mathematics, expected_texts = segments(reference)
    if single_symbols(texts) or single_symbols(expected_texts):
        unwrapped = [TEXT.sub(r" \1 ", text) for text in (prediction, reference)]
        return "text" not in "".join(unwrapped) and algebra.equal(*unwrapped)
    if texts != expected_texts:
        return False
    return all(
        one == other or (bool(one) and bool(other) and same_scalar(one, other, algebra))
        for one, other in zip(mathematics, expected_mathematics, strict=True)
    )


def single_symbols(texts: Sequence[object]) -> bool:
    r"""Returns whether each text is one letter, such as the e of `1-\frac{1}{\mathrm{e}}`."""
    return bool(texts) and all(isinstance(text, str) and len(text) == 1 for text in texts)


def split_plain_unit(prediction: str, reference: str, expected: Factors | None = None) -> tuple[str, Factors | None]:
    """Splits `5 m` without markup into `5` and meters for a plain-number reference; `5m` only if it has `expected`."""
    found = PLAIN_UNIT_SYMBOL.fullmatch(prediction)
    if found is None or found["symbol"] not in SI_SYMBOLS or parse_number(reference) is None:
        return prediction, None
    unit: Factors = ((SI_SYMBOLS[found["symbol"]], int(found["power"] or 1)),)
    return (found["value"], unit) if found["space"] or unit == expected else (prediction, None)


def is_angle(text: str) -> bool:
    return r"\pi" in text or r"\arc" in text


def angles(value: str, unit: Factors | None, expected: str, expected_unit: Factors | None) -> tuple[str, str] | None:
    r"""Converts both to radians if one is in degrees and the other, without a unit, in multiples of \pi."""
    as_radians = r"\cdot \frac{\pi}{180}"
    if unit == DEGREES and expected_unit in (None, RADIANS) and is_angle(expected) and not is_angle(value):
        return f"({value}) {as_radians}", expected
    if expected_unit == DEGREES and unit in (None, RADIANS) and is_angle(value) and not is_angle(expected):
        return value, f"({expected}) {as_radians}"
    return None
