r"""Turns questions into words to tell whether two are the same: numbers count, markup and punctuation do not."""

from __future__ import annotations

import re
import unicodedata

# These marks change the look of a formula but not its meaning.
LOOK = re.compile(r"\\(?:left|right|displaystyle|quad|qquad|big|Big|bigg|Bigg)(?![a-zA-Z])|\\[,;:!()\[\] ]|\$|~")
SMALL_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
BETWEEN_WORDS = re.compile(r"(?<=\w)\s+(?=\w)")
OTHER_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
# It matches a number with digit groups, a LaTeX command, one character of a script without spaces, a word, or a sign.
WORD = re.compile(
    r"\d+(?:,\d{3})*(?:\.\d+)?|\\[a-z]+|[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\d_]+|[^\w\s]"
)
PUNCTUATION = frozenset(".,;:!?'\"`{}_\\…。，、；：！？“”‘’「」（）")
IMAGE = re.compile(
    r"!\[[^\]]*\]\([^)]*\)|<img\b|\\includegraphics|<image\b|https?://\S+?\.(?:png|jpe?g|gif|svg|webp|bmp)\b",
    re.IGNORECASE,
)


def same_text_key(question: str) -> str:
    """Returns one key for all questions that differ only in spaces, the look of formulas, and the Unicode form."""
    return OTHER_SPACE.sub("", BETWEEN_WORDS.sub(" ", shown_alike(question)))


def words(question: str) -> list[str]:
    """Returns the words, numbers and signs of a text, in lower case and without punctuation."""
    return [word.replace(",", "") for word in WORD.findall(shown_alike(question).lower()) if word not in PUNCTUATION]


def numbers(found: list[str]) -> tuple[str, ...]:
    return tuple(word for word in found if word[0].isdigit())


def shown_alike(question: str) -> str:
    text = unicodedata.normalize("NFKC", question)
    return LOOK.sub(" ", SMALL_FRACTION.sub(r"\\frac", text))


def has_image(question: str) -> bool:
    """Returns whether the question links to an image, which the model cannot see."""
    return IMAGE.search(question) is not None
