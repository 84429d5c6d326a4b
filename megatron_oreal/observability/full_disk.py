"""Recognises a full disk in the errors of Python, torch and safetensors, which report it in three ways."""

from __future__ import annotations

import errno

WORDS = ("no space left on device", "disk quota exceeded", "os error 28", "os error 122")
# torch reports an incomplete write like this: "[enforce fail at inline_container.cc:672] . unexpected pos".
TORCH_WORDS = ("unexpected pos", "pytorchstreamwriter failed writing")
WAY_OUT = "the disk is full; free space there and give the same command again"


def is_full_disk(error: BaseException) -> bool:
    """Says whether a full disk or quota caused the error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return any(words in text for words in (*WORDS, *TORCH_WORDS))


def describe_os_error(error: BaseException) -> str:
    """Returns the error's message, and for a full disk also a fix."""
    if not is_full_disk(error) or WAY_OUT in str(error):
        return str(error)
    place = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    return f"{place}{WAY_OUT}"
