"""Makes any text safe to print, so that a server's answer or a file cannot move the cursor or overwrite the screen."""

from __future__ import annotations

import unicodedata

KEPT = "\n\t"
# Cc: control characters. Cs: surrogates, which no file can contain. Zl, Zp: line ends, which terminals treat alike.
UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
# These characters change the direction of the text around them.
DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def printable(text: str) -> str:
    r"""Escapes control characters except line ends and tabs. Example: "a\x1b[2J" becomes r"a\x1b[2J"."""
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(escaped(character) if is_unprintable(character) else character for character in text)


def is_unprintable(character: str) -> bool:
    return character not in KEPT and (unicodedata.category(character) in UNPRINTABLE or ord(character) in DIRECTIONS)


def escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
