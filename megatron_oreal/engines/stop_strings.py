"""Finds the end of a response with a stop string: the first token after which its text contains one."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

from megatron_oreal.types import Int32Array

Decode = Callable[[Int32Array], str]  # token ids -> text; the text of a longer sequence contains that of a shorter one
# The number of tokens before a stop string that are decoded with it. Some tokens have no text, and the first token of a
# text may lose its space.
MARGIN = 8


def holds_stop(ids: Int32Array, stop_strings: Sequence[str], decode: Decode) -> bool:
    text = decode(ids)
    return any(stop in text for stop in stop_strings)


def tokens_to_stop_string(ids: Int32Array, stop_strings: Sequence[str], decode: Decode) -> int | None:
    """Returns the length of the shortest prefix whose text contains a stop string, or None if there is none."""
    if not stop_strings or not holds_stop(ids, stop_strings, decode):
        return None
    return bisect.bisect_left(range(len(ids)), True, key=lambda count: holds_stop(ids[:count], stop_strings, decode))


def tail_length(stop_strings: Sequence[str], num_new: int) -> int:
    """Returns how many last tokens may contain a stop string that ends within the last `num_new` tokens."""
    # A token with text has at least one byte.
    return max((len(stop.encode()) for stop in stop_strings), default=0) + num_new + MARGIN
