r"""Compares option letters A to J: alone, with their text or value (`(B) 42`), or several (`A, C`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_oreal.rewards.forms import split_list

INTRODUCTION = r"(?:\\text\{(?:[Tt]he )?(?:[Cc]orrect )?(?:[Oo]ption|[Cc]hoice|[Aa]nswer)(?: is)?\}:? ?)?"
ENCLOSED = r"[(\[]? ?(?:\\text\{ ?(?P<word>[A-Ja-j]) ?\}|\{?(?P<letter>[A-Ja-j])\}?) ?[)\]]?[.:]?"
SINGLE = re.compile(rf"{INTRODUCTION}{ENCLOSED}")
INTRODUCED_WORD = re.compile(
    r"\\text\{(?:[Tt]he )?(?:[Cc]orrect )?(?:[Oo]ption|[Cc]hoice|[Aa]nswer)(?: is)? (?P<letter>[A-J])\}"
    r"[.:]? ?(?P<rest>.*)"
)
# A label with text behind it; the mark or the space between them shows that the label is not a factor.
WITH_REST = re.compile(
    rf"{INTRODUCTION}(?:\( ?(?:\\text\{{ ?(?P<a>[A-J]) ?\}}|(?P<b>[A-J])) ?\)[.:]?"
    r"|(?:\\text\{ ?(?P<c>[A-J]) ?\}|(?P<d>[A-J]))[).:]"
    r"|\\text\{ ?(?P<e>[A-J]) ?\}|(?P<f>[A-J])(?= )) ?(?P<rest>.+)",
    re.DOTALL,
)
# A and I are also English words.
TEXT_WITH_LETTER = re.compile(r"\\text\{(?P<letter>[B-H]) (?P<rest>[^{}]+)\}(?P<more>.*)", re.DOTALL)
ANOTHER_LABEL = re.compile(
    r"(?<![A-Za-z\\_])[A-J](?![A-Za-z'])"
    r"|(?<![a-zA-Z])(?:or|not|either|neither|maybe|perhaps|probably|possibly|unlikely|wrong|incorrect|false|unless|except)"
    r"(?![a-zA-Z])"
)


@dataclass(slots=True, frozen=True)
class Choice:
    label: str
    rest: str  # the option's text or value; "" if there is none


def parse_choice(text: str) -> Choice | None:
    """Returns the label that a normalised answer starts with; a lower-case label counts only if it stands alone."""
    if found := SINGLE.fullmatch(text):
        return Choice((found["word"] or found["letter"]).upper(), "")
    if found := INTRODUCED_WORD.fullmatch(text):
        return Choice(found["letter"], found["rest"].strip())
    if found := WITH_REST.fullmatch(text):
        label = next(found[name] for name in "abcdef" if found[name])
        return Choice(label, found["rest"].strip())
    if found := TEXT_WITH_LETTER.fullmatch(text):
        return Choice(found["letter"], rf"\text{{{found['rest']}}}{found['more']}".strip())
    return None


def is_label(text: str) -> bool:
    """Returns whether the whole text is one capital label."""
    found = SINGLE.fullmatch(text)
    return found is not None and (found["word"] or found["letter"]).isupper()


def has_another_label(rest: str) -> bool:
    return ANOTHER_LABEL.search(rest) is not None


def parse_labels(text: str) -> tuple[str, ...] | None:
    """Returns `("A", "C")` for `A, C` and for `\\text{A and C}`."""
    parts, joints = split_list(text)
    if len(parts) < 2 or "or" in joints or not all(map(is_label, parts)):
        return None
    choices = [parse_choice(part) for part in parts]
    return tuple(choice.label for choice in choices if choice is not None)


def compare_choices(prediction: str, reference: str) -> bool | tuple[str, str] | None:
    """Returns True or False if labels decide, the two values if only those remain, None if no labels are meant."""
    expected_labels = parse_labels(reference)
    if expected_labels is not None:
        labels = parse_labels(prediction)
        if labels is None:
            return prediction.replace(" ", "") == "".join(expected_labels)
        # Options in alphabetical order are a set; in any other order, the order is part of the answer.
        is_set = list(expected_labels) == sorted(expected_labels)
        return sorted(labels) == list(expected_labels) if is_set else labels == expected_labels
    labels = parse_labels(prediction)
    if labels is not None and reference == "".join(labels):
        return True
    expected = parse_choice(reference)
    chosen = parse_choice(prediction)
    if expected is not None and is_label(reference):
        if chosen is None:
            return False
        return chosen.label == expected.label and not has_another_label(chosen.rest)
    if expected is not None and expected.rest and WITH_REST.fullmatch(reference):
        if chosen is None or (not WITH_REST.fullmatch(prediction) and not is_label(prediction)):
            return prediction, expected.rest
        if chosen.label != expected.label or has_another_label(chosen.rest):
            return False
        return True if not chosen.rest else (chosen.rest, expected.rest)
    if chosen is not None and chosen.rest and expected is None and not has_another_label(chosen.rest):
        return chosen.rest, reference
    return None
