from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_oreal.rewards.plain_numbers import parse_number
from megatron_oreal.rewards.spelling import normalize


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", Fraction(7)),
        ("-3", Fraction(-3)),
        ("−3", Fraction(-3)),
        ("+3", Fraction(3)),
        ("1,234", Fraction(1234)),
        ("1,234,567.5", Fraction(2469135, 2)),
        (r"10,\!080", Fraction(10080)),
        (r"11,\! 111,\! 111,\! 100", Fraction(11111111100)),
        (r"10\,080", Fraction(10080)),
        ("1{,}000", Fraction(1000)),
        ("5.", Fraction(5)),
        (".5", Fraction(1, 2)),
        ("-0.50", Fraction(-1, 2)),
        ("3/4", Fraction(3, 4)),
        (r"\frac34", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\frac{3}{-4}", Fraction(-3, 4)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("137 1/2", Fraction(275, 2)),
        ("½", Fraction(1, 2)),
        (r"10\%", Fraction(1, 10)),
        ("10%", Fraction(1, 10)),
        (r"10 \text{ percent}", Fraction(1, 10)),
        ("2^{10}", Fraction(1024)),
        ("2^{-3}", Fraction(1, 8)),
        (r"1.5 \times 10^{3}", Fraction(1500)),
        ("1.5e3", Fraction(1500)),
        ("1.5E-3", Fraction(3, 2000)),
        ("1/2^{99}", Fraction(1, 2**99)),
        ("1" * 1000, Fraction("1" * 1000)),
        ("10^{1000}", Fraction(10**1000)),
    ],
)
def test_plain_numbers_are_exact(text: str, value: Fraction) -> None:
    assert parse_number(normalize(text)) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1, 234",
        "1,23",
        "1 2",
        "1/0",
        r"\frac{1}{0}",
        r"\sqrt{2}",
        "1/2/3",
        "--1",
        "10^{1001}",
        "1e1001",
        "9^9^9",
        "9^{999999}",
        f"{'9' * 30}^{{999}}",
        "1" * 1001,
        "0^{-1}",
        "3x",
        "52_8",
        "5 m",
    ],
)
def test_what_is_no_plain_number(text: str) -> None:
    assert parse_number(normalize(text)) is None
