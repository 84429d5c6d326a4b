r"""Prepares reference answers, and refuses unusable ones when prompts are read."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_oreal.rewards.algebra_needed import NO_ALGEBRA, Algebra, AlgebraNeeded
from megatron_oreal.rewards.answer import MAX_ANSWER_CHARACTERS, MAX_NESTING, extract_answer, nesting_depth
from megatron_oreal.rewards.comparison import all_agree
from megatron_oreal.rewards.form_types import (
    Approximated,
    Assignment,
    Collection,
    Equation,
    Form,
    Inequality,
    Measured,
    Ratio,
    Scalar,
    Table,
)
from megatron_oreal.rewards.forms import parse_form
from megatron_oreal.rewards.hostile_input import refusal
from megatron_oreal.rewards.plain_numbers import parse_number
from megatron_oreal.rewards.spelling import TEXT, normalize

MAX_REFERENCE_CHARACTERS = 10_000


@dataclass(slots=True, frozen=True)
class Reference:
    text: str  # normalised
    is_spelling_only: bool  # True if only its own spelling, or the same plain number, equals it


@functools.lru_cache(maxsize=4096)  # the samples of a group share their reference
def prepare_reference(answer: str) -> Reference:
    """Prepares a reference answer. Raises ValueError if no answer could equal it."""
    if len(answer) > MAX_REFERENCE_CHARACTERS:
        raise ValueError(f"answer must be at most {MAX_REFERENCE_CHARACTERS} characters long, got {len(answer)}")
    is_too_long = len(answer) > MAX_ANSWER_CHARACTERS or nesting_depth(answer) > MAX_NESTING
    boxed = extract_answer(answer) if r"\boxed" in answer else None
    content = boxed.text if boxed is not None and boxed.text else answer
    text = content.strip() if is_too_long else normalize(content)
    if not text:
        raise ValueError(f"answer must not be empty: give each prompt a reference answer, got {answer!r}")
    return Reference(text, is_too_long or refusal(content) is not None or refusal(text) is not None)


def check_reference(answer: str) -> None:
    """Checks, when prompts are read, that responses can be judged by this reference.

    Raises ValueError, which names the fix, for an empty, oversized, unbalanced, hostile or contradictory answer.
    """
    shown = answer if len(answer) <= 60 else answer[:60] + "..."
    if len(answer) > MAX_ANSWER_CHARACTERS:
        raise ValueError(f"answer must be at most {MAX_ANSWER_CHARACTERS} characters long, got {len(answer)}")
    if nesting_depth(answer) > MAX_NESTING:
        raise ValueError(f"answer must be nested at most {MAX_NESTING} deep, got {nesting_depth(answer)}: {shown!r}")
    if not is_balanced(answer):
        raise ValueError(f"answer has braces without their partners; correct it, got {shown!r}")
    if (reason := refusal(answer, may_be_unevaluated=True)) is not None:
        raise ValueError(f"answer holds {reason}; give it another form or remove the prompt, got {shown!r}")
    reference = prepare_reference(answer)
    if contradicts_itself(parse_form(reference.text)):
        raise ValueError(f"answer contradicts itself: its two sides are different numbers, got {shown!r}")


def is_balanced(text: str) -> bool:
    depth, is_escaped = 0, False
    for character in text:
        depth += 0 if is_escaped else (character == "{") - (character == "}")
        if depth < 0:
            return False
        is_escaped = character == "\\" and not is_escaped
    return depth == 0


def contradicts_itself(form: Form) -> bool:
    """Returns whether the answer equates plain numbers that differ: 1/2 = 0.6."""
    values: tuple[Form, ...] = ()
    if isinstance(form, Assignment):
        values = form.values
    elif isinstance(form, Equation):
        values = tuple(map(Scalar, form.operands))
    try:
        return not all_agree(values, NO_ALGEBRA)
    except AlgebraNeeded:
        return False


def evaluate_alone(reference: str, algebra: Algebra) -> None:
    """Does the least work of any comparison with the reference, to find out whether the reference itself is slow."""
    for text in leaves(parse_form(reference)):
        if not TEXT.search(text):
            algebra.equal(text, text)


def leaves(form: Form) -> list[str]:
    """Yields the expressions in a form."""
    if isinstance(form, Scalar):
        return [form.text] if parse_number(form.text) is None else []
    if isinstance(form, Measured):
        return leaves(form.value)
    if isinstance(form, Approximated):
        return leaves(form.exact)
    if isinstance(form, Collection):
        return [text for element in form.elements for text in leaves(element)]
    if isinstance(form, Assignment):
        return [text for value in form.values for text in leaves(value)]
    if isinstance(form, (Equation, Inequality)):
        return list(form.operands)
    if isinstance(form, Table):
        return [cell for row in form.rows for cell in row]
    if isinstance(form, Ratio):
        return list(form.parts)
    return []
