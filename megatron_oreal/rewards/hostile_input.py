"""Rejects text before it reaches an algebra system: text that could run as code, and expressions too slow to evaluate.

The screen does not catch everything, so the budgets of the worker processes limit what passes. Answers spelled like
their reference do not get here, because the verifier accepts equal strings first.
"""

from __future__ import annotations

import re

MAX_EXPONENT = 10**4
MAX_COMBINATORIAL_ARGUMENT = 10**4
MAX_MATRIX_EXPONENT = 100

CODE = re.compile(
    r"__|`|\bimport\b|(?<!\\)\blambda\b|\b(?:eval|exec|open|compile|getattr|setattr|globals|locals|system|subprocess)\s*\("
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")
UNEVALUATED = re.compile(r"\\(?:sum|prod|coprod|i{0,3}int|oint|lim|limsup|liminf|bigcup|bigcap)(?![a-zA-Z])")
SCIENTIFIC = re.compile(r"\d\s?[eE]\s?[+-]?\d{4,}")
INTEGER = re.compile(r"\d+")
# A group, a number or a name before the mark; groups one level deep suffice to find a factorial's argument.
FACTORIAL = re.compile(r"(?P<argument>(?<!\d)\d+|[)\]}])\s?!")
COMBINATORIAL = re.compile(r"\\[dt]?binom|\\choose|\bbinom|\\atop|\)\s*_|(?<![a-zA-Z])[CP]\s*\(|[CP]_|\\Gamma|\\zeta")
MATRIX_POWER = re.compile(r"\\end\{[a-z]*matrix\*?\}[^0-9a-zA-Z]{0,20}\^[^0-9a-zA-Z]{0,5}(\d+)")
ROOT_INDEX = re.compile(r"\\sqrt\s*\[([^\]]*)\]")
PLAIN_POWER = re.compile(r"(?<!\d)\d+\^\d+")


def refusal(text: str, may_be_unevaluated: bool = False) -> str | None:
    """Returns the reason to refuse a text to the algebra system, or None to admit it.

    With `may_be_unevaluated`, sums, products, integrals and limits pass: only the spelling of a reference counts then.
    """
    if CODE.search(text) is not None:
        return "what could run as code"
    if CONTROL.search(text) is not None:
        return "a control character"
    if not may_be_unevaluated and UNEVALUATED.search(text) is not None:
        return "a sum, a product, an integral or a limit"
    if SCIENTIFIC.search(text) is not None or has_large_exponent(text):
        return "an exponent beyond all measure"
    if has_large_factorial(text):
        return "a factorial beyond all measure"
    if COMBINATORIAL.search(text) is not None and largest_integer(text) > MAX_COMBINATORIAL_ARGUMENT:
        return "a binomial beyond all measure"
    if any(value_of_digits(found[1]) > MAX_MATRIX_EXPONENT for found in MATRIX_POWER.finditer(text)):
        return "a matrix power beyond all measure"
    if any(largest_integer(found[1]) > MAX_EXPONENT for found in ROOT_INDEX.finditer(text)):
        return "a root beyond all measure"
    return None


def is_hostile(prediction: str) -> bool:
    """Returns whether the screen refuses the answer of a response."""
    return refusal(prediction) is not None


def value_of_digits(digits: str) -> int:
    """Returns the integer, or a fixed large integer in place of a huge one."""
    digits = digits.lstrip("0") or "0"
    return int(digits) if len(digits) <= 9 else 10**9


def largest_integer(text: str) -> int:
    return max((value_of_digits(digits) for digits in INTEGER.findall(text)), default=0)


def has_large_exponent(text: str) -> bool:
    """Returns whether an exponent, also of a nested power, exceeds the limit, or three powers form a tower."""
    text = text.replace("**", "^").replace(" ", "")
    if any(is_large_exponent(exponent_after(text, index)) for index, mark in enumerate(text) if mark == "^"):
        return True
    return total_exponent(text) > MAX_EXPONENT


def total_exponent(text: str) -> int:
    """Returns the largest product of exponents that apply to one base: 10^6 in (x^{1000})^{1000}."""
    largest = [1]  # of the text, then of each open group
    for index, character in enumerate(text):
        if character in "([{":
            largest.append(1)
            continue
        inside = 1
        if character in ")]}" and len(largest) > 1:
            inside = largest.pop()
        if text[index + 1 : index + 2] == "^":
            inside *= max(1, largest_integer(exponent_after(text, index + 1)))
        largest[-1] = min(max(largest[-1], inside), 10**9)
    return max(largest)


def exponent_after(text: str, caret: int) -> str:
    """Returns the exponent after the caret at index `caret`: one token, or a group with the rest of its tower."""
    index = caret + 1
    depth = 0
    while index < len(text):
        character = text[index]
        if character in ")]}" and depth == 0:
            break
        depth += (character in "([{") - (character in ")]}")
        index += 1
        # The token ends here unless the number continues (x^100 in plain text) or another power follows.
        if depth == 0 and not re.match(r"[0-9a-zA-Z^]", text[index : index + 1]) and text[index - 1] not in "^-+\\":
            break
    return text[caret + 1 : index]


def is_large_exponent(exponent: str) -> bool:
    if exponent.count("^") >= 2 or largest_integer(exponent) > MAX_EXPONENT:
        return True
    # Bound products and powers of numbers inside an exponent without evaluating them.
    bound = 1
    for found in PLAIN_POWER.findall(re.sub(r"[{}()]", "", exponent)):
        base, _, top = found.partition("^")
        base_value, top_value = value_of_digits(base), value_of_digits(top)
        if base_value > 1:
            if top_value > 14 or base_value**top_value > MAX_EXPONENT:
                return True
            bound *= base_value**top_value
    if "!" in exponent and largest_integer(exponent) > 7:
        return True
    factors = re.split(r"\\cdot|\\times|\*|\)\(", exponent)
    if len(factors) > 1:
        for factor in factors:
            bound *= max(1, largest_integer(factor))
    return bound > MAX_EXPONENT


def has_large_factorial(text: str) -> bool:
    if re.search(r"!\s*!", text):
        return True
    for found in FACTORIAL.finditer(text):
        argument = found["argument"]
        if argument.isdigit():
            if value_of_digits(argument) > MAX_COMBINATORIAL_ARGUMENT:
                return True
        else:
            group = group_before(text, found.start("argument"))
            if largest_integer(group) > MAX_COMBINATORIAL_ARGUMENT or re.search(r"[!^]", group):
                return True
    return False


def group_before(text: str, closing: int) -> str:
    """Returns the content of the group that closes at index `closing`, or all text before it if nothing opened it."""
    depth = 0
    for index in range(closing, -1, -1):
        depth += (text[index] in ")]}") - (text[index] in "([{")
        if depth == 0:
            return text[index + 1 : closing]
    return text[:closing]
