"""No regular expression for text from outside takes time that grows with the square of the text's length."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
import time
from pathlib import Path

import pytest

import megatron_oreal.config
import megatron_oreal.data
import megatron_oreal.rewards

PACKAGES = (megatron_oreal.config, megatron_oreal.data, megatron_oreal.rewards)
SCRIPTS = {"megatron_oreal.rewards.worker"}  # runs as a script and changes sys.path; it has no regular expression
UNITS = (
    ["1", "a", "A", " ", "\t", "\n", "~", ".", ",", "1,", "1 ", "a ", "1.", "1,111", "+", "-", "/", "^", "_", "=", "|"]  # noqa: RUF005  # lists in rows are shorter
    + ["!", "'", '"', "$", "%", "#", ":", ";", "(", ")", "[", "]", "{", "}", "()", "{}", "\\", r"\a", r"\a ", r"\frac"]
    + [r"\text{", r"\text{a}", r"\boxed{", r"\begin{", r"\left(", r"\%", r"\,", "1e", "x+", "a=1,", "a1", "{1}", "1/"]
    + ["1:", "a.", "a-", "中", "²", "°", "1/2 ", "and ", " or ", "\r\n", "#### ", "{}(", "<b>", "./", "\x00"]
)
TAILS = ("", "\x01")  # what comes last decides whether a long match fails in the end
SHORT, LONG = 2500, 10_000
MAX_GROWTH = 9.0  # linear is 4, quadratic 16
TOO_SHORT_TO_TELL = 0.01  # seconds; what is quadratic takes longer
NUM_ATTEMPTS = 4
WHOLE = {"match", "fullmatch"}  # these begin at the text's first character alone


@functools.cache
def patterns() -> dict[str, tuple[re.Pattern[str], bool]]:
    """All compiled expressions of the packages' modules, by name, and whether they look everywhere in a text."""
    names: dict[re.Pattern[str], str] = {}
    methods: dict[re.Pattern[str], set[str]] = {}
    for package in PACKAGES:
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            if info.name in SCRIPTS:
                continue
            module = importlib.import_module(info.name)
            source = Path(str(module.__file__)).read_text()
            for name, value in vars(module).items():
                for number, part in enumerate(parts_of(value)):
                    names.setdefault(part, f"{info.name}.{name}[{number}]")
                    uses = re.findall(rf"\b{name}\.(\w+)", source)
                    # A table's expressions are called by other names.
                    methods.setdefault(part, set()).update(uses if isinstance(value, re.Pattern) else {"search"})
    return {name: (part, bool(methods[part] - WHOLE)) for part, name in names.items()}


def parts_of(value: object) -> list[re.Pattern[str]]:
    """The expressions in a module's variable, which may be a table of them."""
    if isinstance(value, re.Pattern):
        return [value] if isinstance(value.pattern, str) else []
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return [part for each in value for part in parts_of(each)] if isinstance(value, (list, tuple)) else []


def seconds(pattern: re.Pattern[str], looks_everywhere: bool, text: str) -> float:
    begin = time.process_time()
    if looks_everywhere:
        for _ in pattern.finditer(text):
            pass
    else:
        pattern.fullmatch(text)
        pattern.match(text)
    return time.process_time() - begin


def test_all_are_found() -> None:
    found = patterns()
    assert len(found) > 30
    slow = re.compile(r"\d+x")
    assert seconds(slow, True, "1" * LONG) > MAX_GROWTH * seconds(slow, True, "1" * SHORT) > 0


@pytest.mark.parametrize("name", patterns())
def test_time_grows_with_the_length(name: str) -> None:
    pattern, looks_everywhere = patterns()[name]
    for unit in UNITS:
        for tail in TAILS:
            short_text, long_text = (unit * (length // len(unit)) + tail for length in (SHORT, LONG))
            for _ in range(NUM_ATTEMPTS):  # a busy machine disturbs one measurement, hardly all
                long = seconds(pattern, looks_everywhere, long_text)
                if long < TOO_SHORT_TO_TELL or long < MAX_GROWTH * seconds(pattern, looks_everywhere, short_text):
                    break
            else:
                raise AssertionError(f"{pattern.pattern}: {unit!r} and {tail!r} take {long:.3f} s")
