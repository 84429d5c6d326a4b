"""Regions: what is one, and which are the same."""

from __future__ import annotations

import pytest

from megatron_oreal.rewards.algebra import ExactAlgebra
from megatron_oreal.rewards.comparison import is_same
from megatron_oreal.rewards.forms import parse_region


@pytest.mark.parametrize(
    "text", [r"x+1 \setminus \{2\}", r"\mathbb{R} \setminus 2", r"\mathbb{R} \setminus [1,2]", r"5 \setminus (1,2)"]
)
def test_a_set_difference_takes_points_out_of_a_region(text: str) -> None:
    assert parse_region(text) is None


def test_the_points_taken_out() -> None:
    region = parse_region(r"\mathbb{R} \setminus \{2, \frac{1}{3}\}")
    assert region is not None and region.excluded == ("2", r"\frac{1}{3}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"(1,2) \cup (0,10)", "(0,10)"),
        (r"(5,6) \cup (0,3) \cup (1,2)", r"(0,3) \cup (5,6)"),
        (r"[2,3] \cup [0,2]", "[0,3]"),
    ],
)
def test_the_order_of_intervals_does_not_count(one: str, other: str) -> None:
    assert is_same(one, other, ExactAlgebra()) and is_same(other, one, ExactAlgebra())
