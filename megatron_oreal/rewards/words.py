r"""Compares answers in words, and text between mathematics, by spelling without capitals and dots."""

from __future__ import annotations

import re

from megatron_oreal.rewards.spelling import TEXT
from megatron_oreal.rewards.units import NotAUnit, merge, parse_tail

GEOMETRY = re.compile(
    r"(?P<mark>\\(?:triangle|angle|overline|overrightarrow"
    r"|overleftrightarrow|widehat|bar|vec|measuredangle|square|odot))(?![a-zA-Z]) ?"
)
LETTERS = re.compile(r"[^\W\d_]+(?:[ .'-]+[^\W\d_]+)*[.']*")
ARTICLES = re.compile(r"^(?:the|a|an) ")
SYNONYMS = (
    {"undefined", "does not exist", "dne", "doesn't exist", "not defined", "nonexistent", "none exists"},
    {"infinitely many", "infinitely many solutions", "infinite", "infinite solutions"},
    {"true", "yes"},
    {"false", "no"},
    {"impossible", "not possible"},
    {"none", "none of these", "none of the above"},
)
SYNONYM_OF = {word: min(group) for group in SYNONYMS for word in group}


def as_word(text: str) -> str | None:
    r"""Returns one spelling of a word or phrase, of two or more plain letters, or of `\triangle ABC`; else None."""
    bare = GEOMETRY.sub("", text)
    is_marked = bare != text or TEXT.search(text) is not None
    bare = TEXT.sub(r"\1", bare)
    if bare != text and GEOMETRY.search(text):
        bare = bare.replace("{", "").replace("}", "")
    bare = " ".join(bare.split())
    if not LETTERS.fullmatch(bare) or (len(bare.replace(" ", "")) < 2 and not is_marked):
        return None
    spelled = ARTICLES.sub("", bare.casefold().replace(".", "")).replace("-", " ")
    spelled = SYNONYM_OF.get(spelled, spelled)
    return spelled if is_marked else spelled.replace(" ", "")


def same_word(prediction: str, reference: str) -> bool | None:
    """Returns None if the reference is not a word, or if a product is written with its sign."""
    expected = as_word(reference)
    answered = as_word(prediction)
    if expected is None:
        # A phrase is not a number; adjacent letters can be a product.
        return False if answered is not None and TEXT.search(prediction) and len(answered) > 1 else None
    marks = GEOMETRY.findall(prediction), GEOMETRY.findall(reference)
    if marks[0] and marks[1] and marks[0] != marks[1]:
        return False
    if answered is not None:
        return answered.replace(" ", "") == expected.replace(" ", "")
    return False if TEXT.search(reference) or not re.search(r"\\cdot|\\frac|[\^/]", prediction) else None


def segments(text: str) -> tuple[list[str], list[object]]:
    r"""Returns the mathematics between texts, and the texts: units in one spelling, words in lower case."""
    mathematics, texts, end = [], [], 0
    for found in TEXT.finditer(text):
        mathematics.append(text[end : found.start()].strip(" ,"))
        texts.append(meaning_of_text(found[0], found[1]))
        end = found.end()
    return [*mathematics, text[end:].strip(" ,")], texts


def meaning_of_text(marked: str, content: str) -> object:
    try:
        scale, factors = parse_tail(marked)
    except NotAUnit:
        return content.strip().casefold()
    return scale, merge(factors)
