r"""Decides whether an answer means the same as the reference by the conventions of README.md, form by form.

`is_same` needs no algebra for words, option letters, plain numbers and lists of those. To compare expressions, it
calls the given `Algebra`; `NoAlgebra` raises AlgebraNeeded, and then a worker process decides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_oreal.rewards.algebra_needed import NO_ALGEBRA, Algebra
from megatron_oreal.rewards.choices import compare_choices
from megatron_oreal.rewards.form_types import (
    Approximated,
    Assignment,
    Collection,
    Congruence,
    Declaration,
    Equation,
    Form,
    Inequality,
    Measured,
    Ratio,
    Region,
    Scalar,
    Table,
)
from megatron_oreal.rewards.forms import parse_form
from megatron_oreal.rewards.intervals import as_region, canonical_intervals
from megatron_oreal.rewards.plain_numbers import parse_number, spell_out_eulers_number
from megatron_oreal.rewards.scalars import angles, same_scalar, spelled_alike, split_plain_unit
from megatron_oreal.rewards.spelling import without_spaces
from megatron_oreal.rewards.units import units_agree
from megatron_oreal.rewards.words import as_word

MAX_MATCHED = 40  # most elements of a list, other than plain numbers, that are matched in any order
CLOCK = re.compile(r"(?P<hour>\d{1,2}) ?: ?(?P<minute>\d{2})(?: ?: ?(?P<second>\d{2}))?")
HALF_DAYS = (("a.m.", 1), ("p.m.", 1))
DECLARED = re.compile(r"([a-zA-Z]) ?\\in ?(\\mathbb ?\{?[ZNQ]\}?)")
LETTER_OR_COMMAND = re.compile(r"\\[a-zA-Z]+|[a-zA-Z]")
FUNCTION_OF = re.compile(r"(?P<function>[a-zA-Z]) ?\( ?(?P<argument>[a-zA-Z]) ?\)(?= ?=)")


def is_same(prediction: str, reference: str, algebra: Algebra = NO_ALGEBRA) -> bool:
    """Returns whether both normalised answers mean the same. Raises AlgebraNeeded."""
    if spelled_alike(prediction, reference):
        return True
    values = parse_number(prediction), parse_number(reference)
    if values[0] is not None and values[1] is not None:
        return values[0] == values[1]
    chosen = compare_choices(prediction, reference)
    if isinstance(chosen, bool):
        return chosen
    if chosen is not None:
        prediction, reference = chosen
        if spelled_alike(prediction, reference):
            return True
    prediction, reference = (
        spell_out_eulers_number(prediction, reference),
        spell_out_eulers_number(reference, prediction),
    )
    prediction = rename_bound_names(prediction, reference)
    one, other = parse_form(prediction), parse_form(reference)
    if is_table_expression(one) and (isinstance(other, Table) or is_table_expression(other)):
        return algebra.equal(prediction, reference)
    if is_table_expression(other) and isinstance(one, Table):
        return algebra.equal(prediction, reference)
    return same_form(one, other, algebra)


def is_table_expression(form: Form) -> bool:
    """Returns whether this is an expression with matrices, such as a product or a power of one."""
    return isinstance(form, Scalar) and r"\begin" in form.text


def rename_bound_names(prediction: str, reference: str) -> str:
    r"""Renames the prediction's argument in f(t) = ... and its declared k \in \mathbb{Z} as in the reference."""
    pairs: list[tuple[str, str]] = []
    declared = DECLARED.findall(prediction), DECLARED.findall(reference)
    if len(declared[0]) == len(declared[1]) == 1 and declared[0][0][1] == declared[1][0][1]:
        pairs.append((declared[0][0][0], declared[1][0][0]))
    functions = FUNCTION_OF.match(prediction), FUNCTION_OF.match(reference)
    if functions[0] and functions[1] and functions[0]["function"] == functions[1]["function"]:
        pairs.append((functions[0]["argument"], functions[1]["argument"]))
    for old, new in pairs:
        letters = set(LETTER_OR_COMMAND.findall(prediction))
        if old != new and new not in letters:
            prediction = rename(prediction, old, new)
    return prediction


def rename(text: str, old: str, new: str) -> str:
    return LETTER_OR_COMMAND.sub(lambda found: new if found[0] == old else found[0], text)


def same_form(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    if isinstance(reference, Approximated):
        return same_form(prediction, reference.exact, algebra)
    if isinstance(prediction, Approximated):
        return is_close(prediction, algebra) and same_form(prediction.exact, reference, algebra)
    if isinstance(prediction, Measured) or isinstance(reference, Measured):
        return same_measure(prediction, reference, algebra)
    prediction, reference = without_declarations(prediction, reference)
    if isinstance(prediction, Assignment) or isinstance(reference, Assignment):
        return same_assignment(prediction, reference, algebra)
    if isinstance(prediction, Collection) or isinstance(reference, Collection):
        return same_collection(prediction, reference, algebra)
    if isinstance(prediction, Region) or isinstance(reference, Region):
        return same_region(prediction, reference, algebra)
    if isinstance(prediction, Equation) or isinstance(reference, Equation):
        return same_equation(prediction, reference, algebra)
    if isinstance(prediction, Ratio) or isinstance(reference, Ratio):
        return same_ratio(prediction, reference, algebra)
    if isinstance(prediction, Scalar) and isinstance(reference, Scalar):
        return same_scalar(prediction.text, reference.text, algebra)
    if isinstance(prediction, Table) and isinstance(reference, Table):
        return same_table(prediction, reference, algebra)
    if isinstance(prediction, Inequality) and isinstance(reference, Inequality):
        return same_inequality(prediction, reference, algebra)
    if isinstance(prediction, Congruence) and isinstance(reference, Congruence):
        return same_congruence(prediction, reference, algebra)
    return prediction == reference


def is_close(form: Approximated, algebra: Algebra) -> bool:
    """Returns whether both sides are numbers and the approximation differs by at most a twentieth."""
    exact = form.exact
    while isinstance(exact, (Assignment, Measured)):
        exact = exact.values[-1] if isinstance(exact, Assignment) else exact.value
    approximation = parse_form(form.approximation)
    if isinstance(approximation, Measured):
        approximation = approximation.value
    if not isinstance(exact, Scalar) or not isinstance(approximation, Scalar):
        return False
    value, rounded = algebra.order_key(exact.text), algebra.order_key(approximation.text)
    return value is not None and rounded is not None and abs(value - rounded) <= abs(value) / 20


def same_congruence(prediction: Congruence, reference: Congruence, algebra: Algebra) -> bool:
    """Compares congruences: x = 5 equals x = 1 modulo 4. The left side is optional."""
    if prediction.left and reference.left and not same_text(prediction.left, reference.left, algebra):
        return False
    if not same_text(prediction.modulus, reference.modulus, algebra):
        return False
    residue, expected, modulus = map(parse_number, (prediction.residue, reference.residue, reference.modulus))
    if residue is not None and expected is not None and modulus:
        return (residue - expected) % modulus == 0
    return same_text(prediction.residue, reference.residue, algebra)


def same_text(prediction: str, reference: str, algebra: Algebra) -> bool:
    return same_form(parse_form(prediction), parse_form(reference), algebra)


def without_declarations(prediction: Form, reference: Form) -> tuple[Form, Form]:
    r"""Removes `k \in \mathbb{Z}` if only one of the two answers has it."""
    one, other = drop_declarations(prediction), drop_declarations(reference)
    has_one, has_other = one != prediction, other != reference
    return (one, other) if has_one != has_other else (prediction, reference)


def drop_declarations(form: Form) -> Form:
    if not isinstance(form, Collection) or form.kind != "list":
        return form
    kept = tuple(element for element in form.elements if not isinstance(element, Declaration))
    if not kept:
        return form
    return (
        kept[0] if len(kept) == 1 else Collection("list", kept, form.joint) if len(kept) < len(form.elements) else form
    )


def same_measure(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    """Returns whether values and units agree. Either may lack a unit; angles may be in degrees or multiples of pi."""
    value, unit = (prediction.value, prediction.unit) if isinstance(prediction, Measured) else (prediction, None)
    expected, expected_unit = (
        (reference.value, reference.unit) if isinstance(reference, Measured) else (reference, None)
    )
    if (
        isinstance(value, Scalar)
        and isinstance(expected, Scalar)
        and (in_radians := angles(value.text, unit, expected.text, expected_unit))
    ):
        return same_scalar(*in_radians, algebra)
    if isinstance(prediction, Assignment) and expected_unit is not None:
        return same_assignment(prediction, reference, algebra)
    if isinstance(reference, Assignment) and unit is not None:
        return same_assignment(prediction, reference, algebra)
    if unit is None and isinstance(value, Scalar) and isinstance(expected, Scalar):
        bare, unit = split_plain_unit(value.text, expected.text, expected_unit)
        value = Scalar(bare)
    if not units_agree(unit, expected_unit):
        return False
    half_day = any(marker in (unit or ()) + (expected_unit or ()) for marker in HALF_DAYS)
    if half_day and isinstance(value, Ratio) and isinstance(expected, Ratio):
        return tuple(map(parse_number, value.parts)) == tuple(map(parse_number, expected.parts))
    return same_form(value, expected, algebra)


def same_assignment(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    """Compares assignments: `x = 5` equals a reference 5 that has no name; two names must be the same."""
    if isinstance(prediction, Assignment) and isinstance(reference, Assignment):
        if spelled_alike(prediction.name, reference.name):
            return all_agree(prediction.values, algebra) and same_form(
                prediction.values[-1], reference.values[-1], algebra
            )
        return equations_agree(prediction, reference, algebra)
    if isinstance(prediction, Assignment):
        if isinstance(reference, (Equation, Inequality)):
            return equations_agree(prediction, reference, algebra)
        if isinstance(reference, Collection) and all(isinstance(e, Assignment) for e in reference.elements):
            return False
        if isinstance(reference, Region) and reference.variable:
            return False
        return all_agree(prediction.values, algebra) and same_form(prediction.values[-1], reference, algebra)
    assert isinstance(reference, Assignment)
    if isinstance(prediction, (Equation, Inequality)):
        return equations_agree(prediction, reference, algebra)
    if isinstance(prediction, Region) and prediction.variable:
        return False
    return same_form(prediction, reference.values[-1], algebra)


def all_agree(values: Sequence[Form], algebra: Algebra) -> bool:
    return all(same_form(value, values[-1], algebra) for value in values[:-1])


def sides(form: Form) -> tuple[str, str] | None:
    if isinstance(form, Assignment) and len(form.values) == 1 and isinstance(form.values[0], Scalar):
        return form.name, form.values[0].text
    if isinstance(form, Equation) and len(form.operands) == 2:
        return form.operands[0], form.operands[1]
    return None


def equations_agree(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    one, other = sides(prediction), sides(reference)
    return one is not None and other is not None and algebra.equations_agree(one, other, same_sign=False)


def same_equation(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    """Compares two equations by their ratio, and an equation with a value by its solution or an identity's value."""
    if isinstance(prediction, Equation) and isinstance(reference, Equation):
        if len(prediction.operands) == len(reference.operands) and all(
            spelled_alike(one, other) for one, other in zip(prediction.operands, reference.operands, strict=True)
        ):
            return True
        return equations_agree(prediction, reference, algebra)
    if isinstance(reference, Equation) or not isinstance(prediction, Equation) or not isinstance(reference, Scalar):
        return False
    values = tuple(Scalar(operand) for operand in prediction.operands)
    if all_agree(values, algebra):
        return same_form(values[-1], reference, algebra)
    if len(prediction.operands) == 2 and (solution := algebra.solve(*prediction.operands)) is not None:
        return same_scalar(solution, reference.text, algebra)
    return False


def same_collection(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    if isinstance(reference, Collection) and isinstance(prediction, Collection):
        return same_elements(prediction, reference, algebra)
    if isinstance(reference, Collection):
        return same_alone(prediction, reference, algebra)
    assert isinstance(prediction, Collection)
    if prediction.kind == "set" and len(prediction.elements) == 1:
        return same_form(prediction.elements[0], reference, algebra)
    if isinstance(reference, Region):
        return same_region(prediction, reference, algebra)
    if isinstance(reference, Table) and prediction.kind == "tuple" and (column := column_of(reference)) is not None:
        return same_in_order(prediction.elements, column, algebra)
    if is_mixed_number(prediction) and isinstance(reference, Scalar):
        parts = [element.text for element in prediction.elements if isinstance(element, Scalar)]
        return same_scalar("+".join(parts), reference.text, algebra)
    return False


def same_alone(prediction: Form, reference: Collection, algebra: Algebra) -> bool:
    """Compares a form other than a list with a list, a set or a tuple."""
    if isinstance(prediction, Region):
        return same_region(prediction, reference, algebra)
    if isinstance(prediction, Table) and reference.kind == "tuple":
        column = column_of(prediction)
        return column is not None and same_in_order(column, reference.elements, algebra)
    if isinstance(prediction, Scalar) and parse_number(prediction.text) is not None and "," in prediction.text:
        parts = tuple(Scalar(part) for part in prediction.text.split(","))
        return same_elements(Collection("list", parts), reference, algebra)  # 100,200,300
    if len(reference.elements) == 1:
        return same_form(prediction, reference.elements[0], algebra)
    if is_mixed_number(reference) and isinstance(prediction, Scalar):
        parts_text = "+".join(element.text for element in reference.elements if isinstance(element, Scalar))
        return same_scalar(prediction.text, parts_text, algebra)
    return False


def column_of(table: Table) -> tuple[Form, ...] | None:
    """Returns the elements of a column vector, which an answer may also write as a tuple."""
    if table.kind != "matrix" or len(table.rows[0]) != 1:
        return None
    return tuple(parse_form(row[0]) for row in table.rows)


def is_mixed_number(form: Collection) -> bool:
    r"""Returns whether the list is a mixed number such as `2 \text{ and } \frac{1}{2}`."""
    texts = [element.text for element in form.elements if isinstance(element, Scalar)]
    if form.joint != "and" or len(texts) != 2 or len(form.elements) != 2:
        return False
    whole, part = map(parse_number, texts)
    return whole is not None and part is not None and whole.denominator == 1 and 0 < part < 1 and whole >= 1


def mapping(form: Collection) -> dict[str, Form] | None:
    """Returns the values by name; None if an element has no name, or two have the same name."""
    named = {e.name.replace(" ", ""): e.values[-1] for e in form.elements if isinstance(e, Assignment)}
    return named if len(named) == len(form.elements) else None


def same_elements(prediction: Collection, reference: Collection, algebra: Algebra) -> bool:
    given, expected = mapping(prediction), mapping(reference)
    if given is not None and expected is not None:
        return given.keys() == expected.keys() and all(same_form(given[n], expected[n], algebra) for n in expected)
    if expected is not None and prediction.kind != "set":
        # Coordinates are in alphabetical order, other values in the order of the reference.
        is_point = prediction.kind == "tuple" and expected.keys() <= {"x", "y", "z"}
        names = sorted(expected) if is_point else list(expected)
        return same_in_order(prediction.elements, tuple(expected[name] for name in names), algebra)
    if given is not None and reference.kind == "tuple":
        return same_in_order(tuple(given[name] for name in sorted(given)), reference.elements, algebra)
    if given is not None:
        prediction = Collection(reference.kind, tuple(given.values()))
    if (prediction.kind == "tuple") != (reference.kind == "tuple"):
        return False
    if {prediction.joint, reference.joint} == {"or", "and"}:
        return False
    if reference.kind == "set":
        prediction, reference = distinct(prediction), distinct(reference)
    if reference.kind == "tuple" or (reference.kind == "list" and is_order_meant(reference)):
        return same_in_order(prediction.elements, reference.elements, algebra)
    if joined_regions(prediction, reference):
        return same_region(prediction, reference, algebra)
    return same_in_any_order(prediction.elements, reference.elements, algebra)


def joined_regions(prediction: Collection, reference: Collection) -> bool:
    everything = (*prediction.elements, *reference.elements)
    return all(isinstance(element, Region) for element in everything)


def distinct(form: Collection) -> Collection:
    return Collection(form.kind, tuple(dict.fromkeys(form.elements)))


def is_order_meant(form: Collection) -> bool:
    """Returns whether the order counts: it does for words, and for numbers some of which repeat."""
    texts = [element.text for element in form.elements if isinstance(element, Scalar)]
    if len(texts) < len(form.elements):
        return False
    keys = [parse_number(text) if parse_number(text) is not None else without_spaces(text) for text in texts]
    return all(as_word(text) is not None for text in texts) or len(set(keys)) < len(keys)


def same_in_order(prediction: Sequence[Form], reference: Sequence[Form], algebra: Algebra) -> bool:
    return len(prediction) == len(reference) and all(
        same_form(one, other, algebra) for one, other in zip(prediction, reference, strict=True)
    )


def same_in_any_order(prediction: Sequence[Form], reference: Sequence[Form], algebra: Algebra) -> bool:
    if len(prediction) != len(reference):
        return False
    numbers = [
        [parse_number(e.text) if isinstance(e, Scalar) else None for e in form] for form in (prediction, reference)
    ]
    if None not in numbers[0] and None not in numbers[1]:
        return sorted(n for n in numbers[0] if n is not None) == sorted(n for n in numbers[1] if n is not None)
    if len(prediction) > MAX_MATCHED:
        return same_in_order(prediction, reference, algebra)
    left = list(reference)
    for element in prediction:
        place = next((index for index, other in enumerate(left) if same_form(element, other, algebra)), None)
        if place is None:
            return False
        del left[place]
    return True


def same_table(prediction: Table, reference: Table, algebra: Algebra) -> bool:
    shapes = [[len(row) for row in table.rows] for table in (prediction, reference)]
    if prediction.kind != reference.kind or shapes[0] != shapes[1]:
        return False
    cells = zip(sum(prediction.rows, ()), sum(reference.rows, ()), strict=True)
    return all(spelled_alike(one, other) or same_text(one, other, algebra) for one, other in cells)


def same_ratio(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    """Compares ratios: 1:2:3 equals 2:4:6, and a:b also equals the fraction a/b."""
    if isinstance(prediction, Ratio) and isinstance(reference, Ratio):
        if len(prediction.parts) != len(reference.parts):
            return False
        first, expected = prediction.parts[0], reference.parts[0]
        return all(
            same_scalar(rf"({part}) \cdot ({expected})", rf"({other}) \cdot ({first})", algebra)
            for part, other in zip(prediction.parts[1:], reference.parts[1:], strict=True)
        )
    texts = [
        rf"\frac{{{form.parts[0]}}}{{{form.parts[1]}}}"
        if isinstance(form, Ratio) and len(form.parts) == 2
        else form.text
        if isinstance(form, Scalar)
        else None
        for form in (prediction, reference)
    ]
    return texts[0] is not None and texts[1] is not None and same_scalar(texts[0], texts[1], algebra)


def same_inequality(prediction: Inequality, reference: Inequality, algebra: Algebra) -> bool:
    if prediction.is_strict != reference.is_strict:
        return False
    pairs = list(zip(prediction.operands, reference.operands, strict=True))
    if all(same_text(one, other, algebra) for one, other in pairs):
        return True
    one, other = prediction.operands, reference.operands
    return len(one) == 2 and algebra.equations_agree((one[0], one[1]), (other[0], other[1]), same_sign=True)


def same_region(prediction: Form, reference: Form, algebra: Algebra) -> bool:
    """Compares unions of intervals; a pair counts as an open interval if the other side is one."""
    one, other = as_region(prediction, algebra), as_region(reference, algebra)
    if one is None or other is None:
        return False
    if one.variable and other.variable and not spelled_alike(one.variable, other.variable):
        return False
    pieces, expected = canonical_intervals(one, algebra), canonical_intervals(other, algebra)
    return len(pieces) == len(expected) and all(
        (piece.is_start_open, piece.is_end_open) == (target.is_start_open, target.is_end_open)
        and same_scalar(piece.start, target.start, algebra)
        and same_scalar(piece.end, target.end, algebra)
        for piece, target in zip(pieces, expected, strict=True)
    )
