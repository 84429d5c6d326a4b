"""No regular expression for text from outside takes time that grows with the square of the text's length."""

from __future__ import annotations

import importlib
import pkgutil
import re
import time

import pytest

import megatron_oreal.config
import megatron_oreal.data
import megatron_oreal.rewards

PACKAGES = (megatron_oreal.config, megatron_oreal.data, megatron_oreal.rewards)
SCRIPTS = {"megatron_oreal.rewards.worker"}  # runs as a script and changes sys.path; it has no regular expression
UNITS = (
    "1", "a", "A", " ", "\t", "\n", "~", ".", ",", "1,", "1 ", "a ", " a", "1.", "1,111", "+", "-", "/", "*", "^", "_", "=", "<",
    "|", "!", "?", "'", '"', "$", "%", "&", "#", ":", ";", "(", ")", "[", "]", "{", "}", "()", "{}", "\\", "\\\\", r"\a", r"\a ",
    r"\frac", r"\text{", r"\text{a}", r"\boxed{", r"\begin{", r"\end{", r"\left(", r"\%", r"\$", r"\,", "1e", "e1", "x+", "x=", "a=1,",
    "a_", "a1", "1a", "{1}", "(1)", "1/", "1:", "a.", "a-", "a'", "中", "²", "½", "√", "°", "1/2 ", "and ", " or ", "  ", "\r\n", "#### ",
    "{}(", "<b>", "${", "http://", "~/", "./", "\x00",
)  # fmt: skip
TAILS = ("", "!", "\x01", "}")  # what comes last decides whether a long match fails in the end
SHORT, LONG = 2500, 10_000
MAX_GROWTH = 9.0  # linear is 4, quadratic 16
TOO_SHORT_TO_TELL = 0.01  # seconds
NUM_ATTEMPTS = 4


def patterns() -> dict[str, re.Pattern[str]]:
    """All compiled expressions of the packages' modules, by name."""
    found = {}
    for package in PACKAGES:
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name in SCRIPTS:
                continue
            for name, value in vars(importlib.import_module(info.name)).items():
                for number, each in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                    for part in each if isinstance(each, tuple) else [each]:
                        if isinstance(part, re.Pattern) and isinstance(part.pattern, str):
                            found.setdefault(part.pattern, f"{info.name}.{name}[{number}]")
    return {name: re.compile(pattern) for pattern, name in found.items()}


def seconds(pattern: re.Pattern[str], text: str) -> float:
    """Of what costs most: looking everywhere, and matching the whole."""
    begin = time.process_time()
    for _ in pattern.finditer(text):
        pass
    pattern.fullmatch(text)
    return time.process_time() - begin


def test_all_are_found() -> None:
    assert len(patterns()) > 30


@pytest.mark.parametrize("name", patterns())
def test_time_grows_with_the_length(name: str) -> None:
    pattern = patterns()[name]
    for unit in UNITS:
        for tail in TAILS:
            long_text = unit * (LONG // len(unit)) + tail
            if seconds(pattern, long_text) < TOO_SHORT_TO_TELL:
                continue
            short_text = unit * (SHORT // len(unit)) + tail
            for _ in range(NUM_ATTEMPTS):  # a busy machine disturbs one measurement, hardly all
                short, long = seconds(pattern, short_text), seconds(pattern, long_text)
                if long < max(TOO_SHORT_TO_TELL, MAX_GROWTH * short):
                    break
            else:
                raise AssertionError(f"{unit!r} and {tail!r}: {short:.4f} s, and {long:.4f} s for four times the length")
