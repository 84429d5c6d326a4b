"""No text makes what runs in the trainer's own process slow: time grows with the length, not with its square."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from megatron_oreal.rewards.answer import extract_answer
from megatron_oreal.rewards.hostile_input import refusal
from megatron_oreal.rewards.references import check_reference, prepare_reference
from megatron_oreal.rewards.spelling import normalize
from megatron_oreal.rewards.units import parse_quantity

UNITS = [
    "~",
    " ",
    "1",
    "x+1",
    "1%",
    "%",
    "1,",
    ", ",
    r"\frac",
    r"\frac{1}",
    r"\text{a}",
    r"\text{",
    r"\text{ }",
    "a ",
    "ab ",
    "^",
    "_{",
    "{",
    "}",
    "(",
    ")",
    "|",
    r"\\",
    "\\",
    "$",
    r"\$",
    "=",
    "x=",
    "<",
    ":",
    r"\pm",
    r"\sqrt",
    "√",
    "²",
    "½",
    "π",
    "5 cm ",
    "5cm",
    "and ",
    " or ",
    "1e",
    "9e9",
    ".",
    "...",
    "!",
    "\n",
    r"\ ",
    r"\,",
    r"\!",
    "'",
    "-",
    "a-",
    "a.",
    "A. ",
    r"\boxed{",
    r"\begin{",
    r"\end{pmatrix}",
    r"\color{",
    r"\mod",
    r"\in",
    r"\cup",
    "中",
    "、",
    "和",
    r"^\circ",
    "°",
    r"\operatorname{",
    r"{\rm ",
    "U ",
    "\t",
    "(mod ",
    "0.\\overline{3}",
]
SHORT, LONG = 2500, 10_000
MAX_GROWTH = 9.0  # linear is 4, quadratic 16
TOO_SHORT_TO_TELL = 0.02  # seconds
NUM_ATTEMPTS = 4


def seconds(run: Callable[[str], object], text: str) -> float:
    started = time.process_time()
    with suppress(ValueError):
        run(text)
    return time.process_time() - started


def assert_linear(run: Callable[[str], object], short_text: str, long_text: str) -> None:
    for _ in range(NUM_ATTEMPTS):  # a busy machine disturbs one measurement, hardly all
        short, long = seconds(run, short_text), seconds(run, long_text)
        if long < max(TOO_SHORT_TO_TELL, MAX_GROWTH * short):
            return
    raise AssertionError(f"{run}: {short:.3f} s and, for {LONG // SHORT} times the length, {long:.3f} s")


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("frame", ["{}", r"\text{{x{}y}}"])
def test_normalisation_and_screen_are_linear(unit: str, frame: str) -> None:
    for run in (normalize.__wrapped__, refusal):
        short, long = (frame.format(unit * (length // len(unit))) for length in (SHORT, LONG))
        assert_linear(run, short, long)


@pytest.mark.parametrize(
    "unit",
    [*UNITS, "^\\circ", ".^\\circ", r"\text{cm}", r"\text{m m }", r"\cdot\text{m}", r"/\text{s}", r"\text{million}"],
)
@pytest.mark.parametrize("end", ["", "+"])
def test_units_are_read_in_linear_time(unit: str, end: str) -> None:
    short, long = (f"3 {unit * (length // len(unit))}{end}" for length in (SHORT, LONG))
    assert_linear(parse_quantity, short, long)


@pytest.mark.parametrize("unit", UNITS)
def test_references_and_extraction_are_linear(unit: str) -> None:
    for run in (prepare_reference.__wrapped__, check_reference, extract_answer):
        short, long = (unit * (length // len(unit)) for length in (SHORT, LONG))
        assert_linear(run, short, long)
