r"""Extracts a response's answer, the last balanced `\boxed{...}` after the last end-of-thinking mark; makes vote keys.

Every function takes time linear in the text, and bounds the answer's length before any regular expression runs on it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_oreal.rewards.choices import parse_choice
from megatron_oreal.rewards.equality import short_value
from megatron_oreal.rewards.form_types import Assignment, Collection, Form, Measured, Scalar
from megatron_oreal.rewards.forms import parse_form
from megatron_oreal.rewards.spelling import normalize, without_spaces
from megatron_oreal.rewards.words import as_word

if TYPE_CHECKING:
    from megatron_oreal.config import AnswerRule  # not imported in worker processes, because the import is slow

MAX_ANSWER_CHARACTERS = 1000
MAX_NESTING = 50

THINKING_END_MARKS = ("</think>", "</thinking>")

BRACE_TOKEN = re.compile(r"(?P<box>\\{1,2}(?:boxed|fbox)\s{0,8}\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


CONCLUSION_MARKS = ("<conclude>", "**Final Answer**", "</think>")


def within_answer_tags(response: str) -> str:
    """Returns the content of the last <answer>...</answer>, or "" without one (Open-Reasoner-Zero's rule)."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, end) if end >= 0 else -1
    return response[start + len("<answer>") : end] if start >= 0 else ""


def after_conclusion_mark(response: str) -> str:
    """Returns the text after the last of CONCLUSION_MARKS, or the whole text without one (OREAL's rule)."""
    return response[
        max((response.rfind(mark) + len(mark) for mark in CONCLUSION_MARKS if mark in response), default=0) :
    ]


ANSWER_REGIONS: dict[AnswerRule, Callable[[str], str]] = {
    "last_box": str,
    "answer_tags": within_answer_tags,
    "conclusion": after_conclusion_mark,
}


@dataclass(slots=True, frozen=True)
class Extraction:
    """The answer of a response: `text` if `status` is "found"; otherwise `status` says why there is none."""

    status: Literal["found", "no_answer", "too_long"]
    text: str | None


def extract_answer(response: str) -> Extraction:
    r"""Returns the content of the last `\boxed{...}`; of a box inside a box, the outer one counts.

    The status is "no_answer" if there is no box, an empty one, or a last one that is not closed. An earlier box does
    not count then, because a policy would otherwise learn to let its response be truncated.
    """
    start = max(response.rfind(mark) + len(mark) if mark in response else 0 for mark in THINKING_END_MARKS)
    span = find_last_box(response, start)
    if span is None:
        return Extraction("no_answer", None)
    text = response[span[0] : min(span[1], span[0] + MAX_ANSWER_CHARACTERS)].strip()
    if span[1] - span[0] > MAX_ANSWER_CHARACTERS:
        return Extraction("too_long", text)
    return Extraction("found", text) if text else Extraction("no_answer", None)


def find_last_box(text: str, start: int) -> tuple[int, int] | None:
    """Returns (first, last + 1) index of the content of the last box from `start` on; None if missing or not closed."""
    open_braces: list[int | None] = []  # the content's first index for a box, None for another brace
    last_box_start = -1
    closed: tuple[int, int] | None = None
    for token in BRACE_TOKEN.finditer(text, start):
        if token["box"]:
            last_box_start = token.end()
            open_braces.append(token.end())
        elif token["open"]:
            open_braces.append(None)
        elif token["close"] and open_braces:
            box_start = open_braces.pop()
            if box_start is not None:
                closed = (box_start, token.start())
    if closed is None or closed[1] < last_box_start:
        return None
    return closed


def nesting_depth(text: str) -> int:
    """Returns the deepest nesting of braces, brackets and parentheses, closed or not."""
    depth = deepest = 0
    for character in text:
        if character in "{[(":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "}])":
            depth = max(0, depth - 1)
    return deepest


def answer_key(text: str) -> str:
    """Returns a key that a majority vote counts: equal for answers spelled alike and for equal plain numbers."""
    if nesting_depth(text) > MAX_NESTING:
        return text
    return form_key(parse_form(normalize(text)))


def form_key(form: Form) -> str:
    """Returns the key of a form: it ignores names, units other than halves of a day, and the order of a list."""
    if isinstance(form, Scalar):
        choice = parse_choice(form.text)
        if choice is not None and not choice.rest:
            return choice.label
        return as_word(form.text) or short_value(form.text) or without_spaces(form.text)
    if isinstance(form, Measured):
        halves = [name for name, _ in form.unit if name in ("a.m.", "p.m.", "B.C.")]
        return " ".join([form_key(form.value), *halves])
    if isinstance(form, Assignment):
        return form_key(form.values[-1])
    if isinstance(form, Collection):
        keys = [form_key(element) for element in form.elements]
        return f"({', '.join(keys)})" if form.kind == "tuple" else ", ".join(sorted(keys))
    return without_spaces(repr(form))
