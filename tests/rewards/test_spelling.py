from __future__ import annotations

import pytest

from megatron_oreal.rewards.scalars import spelled_alike
from megatron_oreal.rewards.spelling import normalize, plain_characters


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\tfrac 1 2", r"\frac{1}{2}"),
        (r"\sqrt5", r"\sqrt{5}"),
        (r"$x + 1$.", "x+1"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"4210_{5}", "4210_5"),
        ("+5x", "5x"),
        ("{x}", "x"),
        (r"a \times b", r"a \cdot b"),
        (r"-2 ≤ x ≤ 7", r"-2 \le x \leqslant 7"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("(1, 2)", "(1,2)"),
        ("x := 5", "x=5"),
        (r"\color{blue}{5}", "5"),
        (r"\mathrm{cm}", r"\text{cm}"),
        (r"\text{(C)}", r"(\text{C})"),
        (r"7 \text{ or 8}", r"7 \text{or} 8"),
        (r"\text{ a.m.}", r"\text{am}"),
        (r"\text{sq. ft.}", r"\text{sq ft}"),
        (r"\text{two}", "2"),
        (r"\text{all real numbers}", r"\mathbb{R}"),
        (r"x \equiv 3 \pmod{7}", r"x \equiv 3 \mod 7"),
        (r"2*x**3", r"2 \cdot x^3"),
        ("5 apples", r"5 \text{apples}"),
        ("sin x", r"\sin x"),
        ("3pi", r"3\pi"),
        ("1 and 2", r"1 \text{and} 2"),
        ("3^{\\text{rd}}", "3"),
        (r"(0,1) \text{ U } (2,3)", r"(0,1) \cup (2,3)"),
    ],
)
def test_spellings_of_one_answer(one: str, other: str) -> None:
    assert spelled_alike(normalize(one), normalize(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [("1, 234", "1,234"), ("xy", "yx"), (r"2\mathbf{v}", "2"), ("10", r"10\%"), ("b", r"\beta"), ("x_1", "x^1")],
)
def test_what_is_spelled_differently(one: str, other: str) -> None:
    assert not spelled_alike(normalize(one), normalize(other))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("x²", "x^{2}"),
        ("x₁₂", "x_{12}"),
        ("2½", r"2\frac{1}{2}"),
        ("（1，2）", "(1,2)"),
        ("１２", "12"),
        ("π", r"\pi "),
        ("√3", r"\root 3"),
        ("℃", r"^\circ \text{C}"),
        ("Ω", r"\Omega "),
        ("é", "é"),
    ],
)
def test_characters_that_mean_the_same(text: str, plain: str) -> None:
    assert plain_characters(text) == plain
