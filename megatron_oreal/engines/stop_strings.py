"""Finds where a response ends with a stop string: after the first token with which its text holds one."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from megatron_oreal.types import Int32Array

Decode = Callable[[Int32Array], str]  # token ids -> text; the text of more tokens holds what the text of fewer holds
# Tokens before a stop string that are decoded with it: some have no text, and the first of a text may lose its space.
MARGIN = 8


def holds_stop(ids: Int32Array, stop_strings: Sequence[str], decode: Decode) -> bool:
    text = decode(ids)
    return any(stop in text for stop in stop_strings)


def tokens_to_stop_string(ids: Int32Array, stop_strings: Sequence[str], decode: Decode) -> int | None:
    """Returns the length of the shortest beginning whose text holds a stop string; None when the text holds none."""
    if not stop_strings or not holds_stop(ids, stop_strings, decode):
        return None
    return bisect.bisect_left(range(len(ids)), True, key=lambda count: holds_stop(ids[:count], stop_strings, decode))


def tail_length(stop_strings: Sequence[str], num_new: int) -> int:
    """Returns how many last tokens to look at for a stop string that ends within the last `num_new` tokens."""
    # A token with text has one byte or more.
    return max((len(stop.encode()) for stop in stop_strings), default=0) + num_new + MARGIN
