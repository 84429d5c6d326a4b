"""Reads what a judge, or the rules beside a judge, said about a response, in any of the forms that a row may have."""

from __future__ import annotations

from collections.abc import Mapping

KEYS = ("status", "verdict", "is_correct", "correct", "reward")


def opinion_of(value: object) -> str | None:
    """Returns a status such as "correct" or "incorrect"; None where nothing was said.

    Example: `"correct"`, `true`, `1.0`, `{"status": "correct"}` and `{"is_correct": true}` all say "correct". A status
    of another name, for example "timeout", stays as it is.
    """
    if isinstance(value, Mapping):
        return next((found for key in KEYS if (found := opinion_of(value.get(key))) is not None), None)
    if isinstance(value, bool):
        return "correct" if value else "incorrect"
    if isinstance(value, int | float):
        return "correct" if value > 0 else "incorrect"
    if isinstance(value, str) and value.strip():
        word = value.strip()
        return word.lower() if word.lower() in ("correct", "incorrect") else word
    return None
