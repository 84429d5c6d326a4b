r"""Parses the outer form of a normalised answer: a list, a tuple, an interval, named values, an equation, a matrix.

`parse_form` splits the text at its top level and stops at expressions, which stay LaTeX (`Scalar`). Conventions: a bare
list and a set in braces are the same; a tuple is neither; `(1,2)` is a tuple, which can also mean an open interval.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from fractions import Fraction

from megatron_oreal.rewards.form_types import (
    INFINITE,
    Approximated,
    Assignment,
    Collection,
    Congruence,
    Declaration,
    Equation,
    Form,
    Inequality,
    Interval,
    Measured,
    Ratio,
    Region,
    Scalar,
    Table,
)
from megatron_oreal.rewards.plain_numbers import parse_number
from megatron_oreal.rewards.spelling import TEXT, meaning_of, remove_outer_braces
from megatron_oreal.rewards.units import Factors, parse_quantity

MAX_ELEMENTS = 500


# Only a comma before exactly three digits separates thousands.
JOINTS = r", |(?<!\d),|,(?!\d{3}(?!\d))|;|\\text\{(?:and|or|and/or)\}|\\lor(?![a-zA-Z])|\\land(?![a-zA-Z])"
ALL_COMMAS = r"[,;]|\\text\{(?:and|or)\}"
JOINT_WORDS = re.compile(r"(?:^| )(and|or)(?: |$)")
RELATION = r"=|<|>|\\(?:leq|geq|neq|in|approx|equiv)(?![a-zA-Z])"
OPEN, CLOSE = "([{", ")]}"
GREEK_NAME = (
    r"\\(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega|ell|"
    r"Gamma|Delta|Theta|Lambda|Phi|Psi|Omega)"
)
LETTER = rf"(?:[a-zA-Z]|{GREEK_NAME})"
INDEX = r"(?:_(?:\w|\{[\w ,]+\}))?'{0,2}"
NAME = re.compile(
    rf"(?:{LETTER} ?{INDEX}"
    rf"|[a-zA-Z]{INDEX}(?:\^\{{-1\}}|\^\{{\(?\w\)?\}})? ?\( ?(?:{LETTER}|-?\d+)(?: ?, ?(?:{LETTER}|-?\d+))* ?\)"
    r"|[PE] ?[(\[].*[)\]]"
    r"|\|?[A-Z]{2,4}\|?|\[[A-Z]{3,6}\]|\\overline\{[A-Z]{2}\}|\\(?:vec|hat|bar|overline)(?:\{\w+\}| ?\w)"
    r"|m?\\angle ?[A-Z]{1,3}"
    r"|S_\{\\triangle ?[A-Z]{3}\}|\\triangle|\\text\{[^{}]*\}(?:_\w)?)"
)
TUPLE_OF_NAMES = re.compile(rf"\( ?{LETTER}{INDEX}(?: ?, ?{LETTER}{INDEX})+ ?\)")
ENVIRONMENT = re.compile(
    r"(?P<factor>[^&]*?)\\begin ?\{(?P<kind>[pbBvV]?(?:small)?matrix|array|cases)\*?\}(?: ?\{[lcr| ]*\})?(?P<body>.*)"
    r"\\end ?\{(?P=kind)\*?\}(?P<transposed> ?\^(?:T|\{T\}|\\top|\{\\top\}|\\intercal))?",
    re.DOTALL,
)
ALL_BUT = re.compile(r"\\text\{all real numbers except(?: for)?\} ?(?:[a-z] ?= ?)?(?P<points>.+)", re.IGNORECASE)
# Several units make one value: 5 hours and 30 minutes.
COMPOUND = re.compile(
    r"(\\text\{(?:hours?|hrs?|feet|foot|ft|pounds?|lbs?|days?|weeks?|years?|minutes?|min|dollars?))(?: and)?\},? ?"
    r"(?:\\text\{and\} ?)?(?=\d{1,9} ?\\text\{(?:minutes?|min|inch(?:es)?|in|ounces?|oz|hours?|months?|days?|"
    r"seconds?|sec|cents?)\})"
)
CONDITION_WORDS = re.compile(r",? ?\\text\{(?:if|for|when|where|otherwise|else)\} ?|, ?$")
NUMBER_SETS = {r"\mathbb{Z}", r"\mathbb{N}", r"\mathbb{Q}", r"\mathbb{Z}^+", r"\mathbb{N}^*", r"\mathbb{Z}^{+}"}
REALS = (r"\mathbb{R}", r"\mathbb R", r"\R", r"\Reals")


@functools.lru_cache(maxsize=2048)
def parse_form(text: str) -> Form:
    text = COMPOUND.sub(r"\1} ", meaning_of(strip(text)))
    if parse_number(text) is not None:
        return Scalar(text)
    if found := ALL_BUT.fullmatch(text):
        return Region((INFINITE,), "", tuple(split_list(found["points"])[0]))
    parts, joints = split_list(text)
    if len(parts) > 1:
        joint = "or" if "or" in joints else "and" if "and" in joints else ","
        return Collection("list", flattened(map(parse_form, parts)), joint)
    if r"\pm" in text or r"\mp" in text:
        both = [expand_signs(text, "+", "-"), expand_signs(text, "-", "+")]
        return Collection("list", tuple(map(parse_form, both)))
    quantity = parse_quantity(text)
    if quantity.value != text and r"\text" not in quantity.value:
        value = parse_form(scaled(quantity.value, quantity.scale))
        return measured(value, quantity.unit)
    return (
        parse_table(text)
        or parse_relation(text)
        or parse_region(text)
        or parse_set_builder(text)
        or parse_enclosed(text)
        or parse_ratio(text)
        or Scalar(text)
    )


def measured(value: Form, unit: Factors | None) -> Form:
    """Attaches the unit in `x = 5 \\text{cm}` to the value."""
    if unit is None:
        return value
    if isinstance(value, Assignment):
        return Assignment(value.name, (*value.values[:-1], Measured(value.values[-1], unit)))
    return Measured(value, unit)


def flattened(forms: Iterable[Form]) -> tuple[Form, ...]:
    r"""Expands `\pm 1, \pm 2` to `1, -1, 2, -2`."""
    elements: list[Form] = []
    for form in forms:
        elements += form.elements if isinstance(form, Collection) and form.kind == "list" else [form]
    return tuple(elements)


def scaled(value: str, scale: Fraction) -> str:
    """Returns the value times the scale, as a number if the value is one."""
    if scale == 1:
        return value
    number = parse_number(value)
    product = scale if number is None else number * scale
    fraction = rf"\frac{{{product.numerator}}}{{{product.denominator}}}"
    return fraction if number is not None else rf"({value}) \cdot {fraction}"


def strip(text: str) -> str:
    text = text.strip()
    while (inner := remove_outer_braces(text)) != text:
        text = inner
    return text


def expand_signs(text: str, plus: str, minus: str) -> str:
    return re.sub(r"\\mp(?![a-zA-Z])", minus, re.sub(r"\\pm(?![a-zA-Z])", plus, text))


@functools.lru_cache(maxsize=16)
def with_brackets(pattern: str) -> re.Pattern[str]:
    return re.compile(
        rf"(?P<mark>{pattern})|(?P<open>[(\[{{]|\\begin(?![a-zA-Z]))|(?P<close>[)\]}}]|\\end(?![a-zA-Z]))"
    )


def split_top_level(text: str, pattern: str) -> tuple[list[str], list[str]]:
    """Returns the parts between the matches outside of all brackets, and those matches."""
    parts, marks = [], []
    depth = begin = 0
    for found in with_brackets(pattern).finditer(text):
        if found["open"]:
            depth += 1
        elif found["close"]:
            depth -= 1
        elif depth == 0:
            parts.append(text[begin : found.start()].strip())
            marks.append(found["mark"].strip())
            begin = found.end()
    return [*parts, text[begin:].strip()], marks


def split_list(text: str) -> tuple[list[str], list[str]]:
    """Returns the elements of a bare list and the words between them; other text is returned as the only element."""
    text = TEXT.sub(separate_joints, text)
    parts, marks = split_top_level(text, JOINTS)
    if any(mark.startswith(r"\text") for mark in marks):
        parts[0] = re.sub(r"^\\text\{(?:both|either)\} ?", "", parts[0])
    elements = [part for part in parts if part]
    is_list = (1 < len(elements) <= MAX_ELEMENTS and len(elements) == len(parts)) or is_only_oxford(parts, marks)
    if not is_list:
        return [text], []
    return elements, [JOINT_OF.get(mark, ",") for mark in marks]


def is_only_oxford(parts: list[str], marks: list[str]) -> bool:
    """Returns whether parts are empty only between a comma and the word after it: `1, 2, and 3`."""
    if len(marks) < 2 or not parts[0] or not parts[-1]:
        return False
    return all(part or (marks[place - 1] == "," and marks[place] != ",") for place, part in enumerate(parts) if place)


JOINT_OF = {r"\text{and}": "and", r"\text{or}": "or", r"\lor": "or", r"\land": "and", r"\text{and/or}": "or"}


def separate_joints(found: re.Match[str]) -> str:
    r"""Splits `\text{Tom and Ann}` into `\text{Tom} \text{and} \text{Ann}`."""
    parts = JOINT_WORDS.split(found[1])
    if len(parts) == 1:
        return found[0]
    return " ".join(rf"\text{{{part.strip()}}}" for part in parts if part.strip())


def parse_table(text: str) -> Form | None:
    found = ENVIRONMENT.fullmatch(text)
    if found is None or r"\begin" in found["body"]:
        return None
    kind, factor = found["kind"], found["factor"].strip()
    rows = [
        split_top_level(row, "&")[0]
        for row in split_top_level(found["body"], r"\\\\(?: ?\[\w+\])?|\\cr(?![a-zA-Z])")[0]
    ]
    rows = [row for row in rows if row != [""]]
    if not rows:
        return None
    if kind == "cases":
        cleaned = tuple(tuple(CONDITION_WORDS.sub("", cell).strip() for cell in row) for row in rows)
        if all(len(row) == 1 for row in rows):  # a system: x = 1 and y = 2
            return Collection("list", tuple(parse_form(row[0]) for row in rows))
        return None if factor else Table("cases", cleaned)
    if len({len(row) for row in rows}) != 1:
        return None
    if factor:
        factor = "-1" if factor == "-" else factor.removesuffix(r"\cdot").strip()
        rows = [[rf"({factor}) \cdot ({cell})" for cell in row] for row in rows]
    if found["transposed"]:
        rows = [list(column) for column in zip(*rows, strict=True)]
    return Table("determinant" if kind.startswith(("v", "V")) else "matrix", tuple(map(tuple, rows)))


def parse_relation(text: str) -> Form | None:
    operands, signs = split_top_level(text, RELATION)
    if not signs:
        return None
    if r"\approx" in signs:
        return parse_approximation(text, operands, signs)
    if not all(operands):
        return None
    if r"\equiv" in signs:
        residue, _, modulus = operands[-1].partition(r"\mod")
        return Congruence(operands[0], residue.strip(), modulus.strip()) if len(operands) == 2 and modulus else None
    if signs == [r"\in"]:
        return parse_membership(*operands)
    if set(signs) == {"="}:
        return parse_equations(operands)
    if signs == [r"\neq"]:
        return Region((INFINITE,), operands[0], (operands[1],)) if is_name(operands[0]) else None
    return parse_inequality(operands, signs)


def parse_approximation(text: str, operands: list[str], signs: list[str]) -> Form | None:
    r"""Parses `x = \sqrt2 \approx 1.41`; `x \approx 1.41` means `x = 1.41`."""
    place = signs.index(r"\approx")
    if place == 0 and is_name(operands[0]) and len(operands) == 2:
        return parse_equations(operands)
    exact, _, approximation = text.partition(r"\approx")
    return Approximated(parse_form(exact), approximation.strip()) if exact.strip() else None


def parse_membership(left: str, right: str) -> Form | None:
    if right.replace(" ", "") in NUMBER_SETS:
        return Declaration(left, right)
    region = parse_region(right) or parse_interval(right, is_pair_allowed=is_name(left))
    if region is not None:
        return Region(region.intervals, left, region.excluded)
    return Assignment(left, (parse_form(right),)) if is_name(left) else None


def parse_equations(operands: list[str]) -> Form:
    names = [operand for operand in operands[:-1] if is_name(operand)]
    if names == operands[:-1] and len(names) > 1 and parse_number(operands[-1]) is not None:
        return Collection("list", tuple(Assignment(name, (parse_form(operands[-1]),)) for name in names))
    if TUPLE_OF_NAMES.fullmatch(operands[0]) and len(operands) == 2:
        named, values = split_list(operands[0][1:-1])[0], parse_form(operands[1])
        if isinstance(values, Collection) and values.kind == "tuple" and len(values.elements) == len(named):
            pairs = zip(named, values.elements, strict=True)
            return Collection("list", tuple(Assignment(name, (value,)) for name, value in pairs))
    if is_name(operands[0]):
        return Assignment(operands[0], tuple(map(parse_form, operands[1:])))
    return Equation(tuple(operands))


def is_name(text: str) -> bool:
    return NAME.fullmatch(text) is not None or TUPLE_OF_NAMES.fullmatch(text) is not None


def parse_inequality(operands: list[str], signs: list[str]) -> Form | None:
    if not set(signs) <= {"<", ">", r"\leq", r"\geq"}:
        return None
    ascending = {sign in ("<", r"\leq") for sign in signs}
    if len(ascending) > 1:
        return None
    is_strict = [sign in "<>" for sign in signs]
    if ascending == {False}:
        operands, is_strict = operands[::-1], is_strict[::-1]
    named = [is_name(operand) and operand != "e" for operand in operands]
    if len(operands) == 2 and sum(named) == 1:
        if named[0]:
            return Region((Interval(r"-\infty", operands[1], True, is_strict[0]),), operands[0])
        return Region((Interval(operands[0], r"\infty", is_strict[0], True),), operands[1])
    if len(operands) == 3 and named == [False, True, False]:
        return Region((Interval(operands[0], operands[2], is_strict[0], is_strict[1]),), operands[1])
    return Inequality(tuple(operands), tuple(is_strict))


def parse_region(text: str) -> Region | None:
    r"""Parses intervals with at least one bracket, unions, \mathbb{R}, sets without points, `\{x \mid x > 2\}`."""
    if text in REALS:
        return Region((INFINITE,))
    if text.replace(" ", "") in (r"\{\}", r"\emptyset"):
        return Region(())
    parts, _ = split_top_level(text, r"\\cup(?![a-zA-Z])")
    if len(parts) > 1:
        regions = [part_of_union(part) for part in parts]
        if None in regions:
            return None
        return Region(tuple(interval for region in regions if region for interval in region.intervals))
    parts, _ = split_top_level(text, r"\\setminus(?![a-zA-Z])|\\backslash(?![a-zA-Z])")
    if len(parts) == 2:
        whole, points = part_of_union(parts[0]), parse_form(parts[1])
        if whole is None or not isinstance(points, Collection) or points.kind != "set":
            return None
        if not all(isinstance(point, Scalar) for point in points.elements):
            return None
        return Region(whole.intervals, "", tuple(point.text for point in points.elements if isinstance(point, Scalar)))
    return parse_interval(text, is_pair_allowed=False)


def part_of_union(text: str) -> Region | None:
    region = parse_region(text) or parse_interval(text, is_pair_allowed=True)
    if region is not None or not (text.startswith(r"\{") and text.endswith(r"\}")):
        return region
    points = split_top_level(text[2:-2], ALL_COMMAS)[0]
    return Region(tuple(Interval(point, point, False, False) for point in points))


def parse_interval(text: str, is_pair_allowed: bool) -> Region | None:
    if len(text) < 5 or text[0] not in "([" or text[-1] not in ")]" or not is_enclosed(text, 1):
        return None
    if (text[0], text[-1]) == ("(", ")") and not is_pair_allowed:
        return None
    ends = split_top_level(text[1:-1], ALL_COMMAS)[0]
    if len(ends) != 2 or not all(ends):
        return None
    return Region((Interval(ends[0], ends[1], text[0] == "(", text[-1] == ")"),))


def parse_set_builder(text: str) -> Form | None:
    r"""Returns the condition of `\{x \mid x > 2\}`."""
    if not (text.startswith(r"\{") and text.endswith(r"\}")):
        return None
    parts, marks = split_top_level(text[2:-2], r"\||:|\\text\{such that\}")
    if len(parts) != 2 or not marks:
        return None
    member = re.sub(r" ?\\in ?\\mathbb ?\{?R\}?$", "", parts[0])
    condition = parse_form(parts[1])
    conditions = condition.elements if isinstance(condition, Collection) else (condition,)
    is_condition = all(isinstance(part, Region) and part.variable == member for part in conditions)
    return condition if is_condition else None


def is_enclosed(text: str, width: int) -> bool:
    """Returns whether the first bracket closes exactly at the end; `width` is the length of the opening mark."""
    depth = 0
    for index, character in enumerate(text):
        depth += (character in OPEN) - (character in CLOSE)
        if depth == 0 and index >= width:
            return index == len(text) - 1
    return False


def parse_enclosed(text: str) -> Form | None:
    """Parses a tuple, a set, or the content of parentheses."""
    if text.startswith(r"\langle") and text.endswith(r"\rangle"):
        text = f"({text[7:-7]})"
    is_set = text.startswith(r"\{") and text.endswith(r"\}")
    if not (is_set or (text[:1] == "(" and text[-1:] == ")") or (text[:1] == "[" and text[-1:] == "]")):
        return None
    if not is_enclosed(text, 2 if is_set else 1):
        return None
    content = text[2:-2] if is_set else text[1:-1]
    is_spaced = ", " in content
    elements, _ = split_top_level(content, JOINTS if is_spaced else ALL_COMMAS)
    if not all(elements) or len(elements) > MAX_ELEMENTS:
        return None
    if is_set:
        return Collection("set", tuple(map(parse_form, elements)))
    return Collection("tuple", tuple(map(parse_form, elements))) if len(elements) > 1 else parse_form(content)


def parse_ratio(text: str) -> Form | None:
    if r"\mod" in text:
        residue, _, modulus = text.partition(r"\mod")
        return Congruence("", residue.strip(), modulus.strip()) if residue.strip() and modulus.strip() else None
    parts, _ = split_top_level(text, r":|\\text\{to\}|\\to(?![a-zA-Z])")
    return Ratio(tuple(parts)) if len(parts) > 1 and all(parts) else None
