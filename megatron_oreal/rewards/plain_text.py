r"""Converts plain-text mathematics and plain words, `2*pi`, `sin x`, `5 apples`, `1 and 2`, to LaTeX with `\text`.

A run of letters without a backslash is a product of variables unless it is the name of a function or constant, a word
that joins answers, a unit behind a number, or one of several words in a row.
"""

from __future__ import annotations

import re

from megatron_oreal.rewards.units import is_unit_word
from megatron_oreal.rewards.vocabulary import JOINING_WORDS, PLAIN_FUNCTIONS, SHORT_WORDS

CONSTANTS = {
    "pi": r"\pi ", "infinity": r"\infty ", "infty": r"\infty ", "inf": r"\infty ", "oo": r"\infty ",
    "theta": r"\theta ", "alpha": r"\alpha ", "beta": r"\beta ", "gamma": r"\gamma ", "delta": r"\delta ",
    "epsilon": r"\epsilon ", "lambda": r"\lambda ", "omega": r"\omega ", "sigma": r"\sigma ", "phi": r"\phi ",
    "mu": r"\mu ", "rho": r"\rho ", "union": r"\cup ", "intersection": r"\cap ",
}  # fmt: skip
CURRENCY_CODES = frozenset(("rs", "usd", "inr", "eur", "gbp"))
INVERSES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
# The tokens: a text, an environment or a command as a whole, and a run of letters.
TOKEN = re.compile(
    r"\\text\{[^{}]*\}|\\(?:begin|end) ?\{[^{}]*\}(?:\{[lcr|]*\})?|\\[a-zA-Z]+|\\."
    r"|(?P<run>[^\W\d_]+(?:['-][^\W\d_]{2,})*)"
)
PHRASE = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*(?:,? [^\W\d_]+(?:['-][^\W\d_]+)*)+")
CALL = re.compile(r"(?P<name>sin|cos|tan|cot|sec|csc|ln|log|lg|exp)(?P<argument>[a-z])")
PLAIN_MIXED_FUNCTION = re.compile(r"(?P<factor>[a-z])(?P<name>sin|cos|tan|ln|log|exp|sqrt)(?P<argument>[a-z]?)")
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
CJK_JOINTS = {"和": "and", "与": "and", "及": "and", "和和": "and", "と": "and", "와": "and", "과": "and", "或": "or",
              "或者": "or", "または": "or", "以及": "and"}  # fmt: skip


def mark_plain_text(text: str) -> str:
    r"""Puts plain words into \text{}, and a backslash before plain names of functions."""
    if PHRASE.fullmatch(text) and (words := re.split(r",? ", text)) and is_phrase(words):
        return mark_joints(text)
    num_words = sum(is_long_word(found["run"]) for found in TOKEN.finditer(text) if found["run"])
    parts: list[str] = []
    end = 0
    for found in TOKEN.finditer(text):
        parts.append(text[end : found.start()])
        end = found.end()
        if found["run"]:
            before, after = text[max(0, found.start() - 2) : found.start()], text[end : end + 2]
            parts.append(run_text(found["run"], before, after, num_words > 1))
        else:
            parts.append(translate_text(found[0]))
    return "".join([*parts, text[end:]])


def translate_text(token: str) -> str:
    r"""Translates joining words: \text{和} becomes \text{and}."""
    if not token.startswith(r"\text{") or token.isascii():
        return token
    return rf"\text{{{CJK_JOINTS.get(token[6:-1].strip(), token[6:-1])}}}"


def is_long_word(run: str) -> bool:
    return len(run) > 2 and run not in PLAIN_FUNCTIONS and run.lower() not in CONSTANTS and run not in JOINING_WORDS


def is_phrase(words: list[str]) -> bool:
    """Returns whether consecutive words are language: `Option B` and `A and C` are, `a b c` and `sin x` are not."""
    if any(word in PLAIN_FUNCTIONS or (word in CONSTANTS and word != "infinity") for word in words):
        return False
    return any(len(word) > 1 for word in words)


def mark_joints(text: str) -> str:
    r"""Marks each word that joins answers separately, other words together: `A \text{and} C`."""
    parts = re.split(r"(,? (?:and|or) |, )", text)
    marked = []
    for part in parts:
        if part.strip(" ,") in ("and", "or"):
            marked.append(rf" \text{{{part.strip(' ,')}}} ")
        elif part == ", ":
            marked.append(part)
        else:
            marked.append(rf"\text{{{part}}}")
    return "".join(marked)


def run_text(run: str, before: str, after: str, is_sentence: bool) -> str:
    """Returns the LaTeX that a run of letters means between its neighbours."""
    if CJK.search(run):
        return rf" \text{{{CJK_JOINTS.get(run, run)}}} "
    if len(run) == 1:
        return run
    follows_value = before[-1:].isdigit() or before.endswith(("}", ")", "%")) or before[:1].isdigit()
    if run == "min" and follows_value and not after.lstrip().startswith(("(", "{", "\\")):
        return r" \text{min}"
    if run in PLAIN_FUNCTIONS:
        return rf"\{INVERSES.get(run, run)} "
    if run.lower() in CONSTANTS and (run.islower() or len(run) > 4):
        return CONSTANTS[run.lower()]
    if run in JOINING_WORDS and before.endswith((" ", "}", ")", ",")) and after.startswith((" ", "\\", "(")):
        return rf"\text{{{run}}}"
    if run.lower() in CURRENCY_CODES:
        return rf"\text{{{run}}}"
    if call := CALL.fullmatch(run):
        return rf"\{call['name']} {call['argument']}"
    if mixed := PLAIN_MIXED_FUNCTION.fullmatch(run):
        return rf"{mixed['factor']}\{mixed['name']} {mixed['argument']}"
    if follows_value and is_unit_word(run) and not after.startswith(("_", "(", "{")):
        return rf" \text{{{run}}}"
    is_apart = before[-1:] in ("", " ") and after[:1] in ("", " ", ".", ",", ":")
    if is_apart and (is_sentence and (len(run) > 2 or run.lower() in SHORT_WORDS)):
        return rf"\text{{{run}}}"
    stands_by_number = (before[:1].isdigit() and before[1:] == " ") or (after[:1] == " " and after[1:].isdigit())
    if is_apart and len(run) > 2 and stands_by_number:
        return rf"\text{{{run}}}"
    return run
