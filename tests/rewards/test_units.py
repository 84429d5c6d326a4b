from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_oreal.rewards.spelling import normalize
from megatron_oreal.rewards.units import Factors, merge, parse_quantity, units_agree


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        (r"12 \text{ cm}^2", "12", (("centimeter", 2),)),
        (r"12 \text{ square centimetres}", "12", (("centimeter", 2),)),
        (r"5 \text{ km/h}", "5", (("hour", -1), ("kilometer", 1))),
        (r"5 \frac{\text{m}}{\text{s}^2}", "5", (("meter", 1), ("second", -2))),
        (r"\$5", "5", (("dollar", 1),)),
        (r"-\$5", "-5", (("dollar", 1),)),
        (r"5 \text{ dollars per hour}", "5", (("dollar", 1), ("hour", -1))),
        (r"20^\circ \text{F}", "20", (("fahrenheit", 1),)),
        (r"20^\circ", "20", (("degree", 1),)),
        (r"5 \text{ apples}", "5", (("apple", 1),)),
        (r"5 \text{ different ways}", "5", (("way", 1),)),
        (r"2 \text{ million dollars}", "2", (("dollar", 1),)),
        (r"\text{about } 5", "5", None),
        (r"7 \text{ p.m.}", "7", (("p.m.", 1),)),
    ],
)
def test_value_and_unit(text: str, value: str, unit: Factors | None) -> None:
    quantity = parse_quantity(normalize(text))
    assert (quantity.value, quantity.unit) == (value, unit)


@pytest.mark.parametrize(
    "text",
    [
        r"7 \text{or} 8",
        r"7 \text{ is wrong}",
        r"7 \text{ squared}",
        r"7 \text{ below zero}",
        r"7\mathbf{v}",
        r"7 \text{ x}",
        r"\sin 30^\circ",
        r"\text{m}",
        r"7 \text{ apples pears}",
        "7x",
    ],
)
def test_what_is_no_unit_stays(text: str) -> None:
    normalized = normalize(text)
    quantity = parse_quantity(normalized)
    assert (quantity.value, quantity.unit) == (normalized, None)


@pytest.mark.parametrize(
    ("text", "scale"),
    [("3 dozen", 12), (r"2 \text{ million dollars}", 10**6), (r"3 \text{ halves}", Fraction(1, 2)), ("5 apples", 1)],
)
def test_scale_words(text: str, scale: Fraction) -> None:
    assert parse_quantity(normalize(text)).scale == scale


def test_units_are_optional_but_not_different() -> None:
    meter: Factors = (("meter", 1),)
    assert units_agree(None, meter) and units_agree(meter, None) and units_agree(meter, meter)
    assert not units_agree((("kilometer", 1),), meter)
    assert not units_agree((("meter", 2),), meter)
    assert units_agree((("unit", 1),), (("meter", 2),)) and units_agree((("unit", 2),), (("meter", 2),))
    assert not units_agree((("unit", 2),), (("meter", 3),))
    assert not units_agree((("unit", 1),), (("dollar", 1),))
    assert not units_agree((("B.C.", 1),), None)


def test_a_square_unit_is_the_unit_squared() -> None:
    assert merge([("square mile", 1)]) == merge([("mile", 2)]) == (("mile", 2),)
    assert merge([("square mile", 2), ("mile", -4), ("hour", 1)]) == (("hour", 1),)
