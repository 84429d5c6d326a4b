from __future__ import annotations

import pytest

from megatron_oreal.rewards.hostile_input import is_hostile

HOSTILE = [
    "9^9^9^9",
    "9^{9^{9^9}}",
    "10^{10^{10}}",
    "10^{10^10}",
    "2^{100000}",
    "x^{99999999999999999999999999}",
    "10**10**10",
    "(((10^{99})^{99})^{99})^{99}",
    r"2^{100 \cdot 1000}",
    "2^{(100)(1000)}",
    "2^{20!}",
    "100000!",
    "(10^5)!",
    "((5!)!)!",
    "9!!",
    r"\binom{100000}{50000}",
    r"{100000 \choose 5}",
    r"\sum_{k=1}^{10^9} k",
    r"\prod_{k=1}^{99} k",
    r"\int_0^1 x^x dx",
    r"\lim_{x \to 0} x",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{100000}",
    r"\sqrt[1000000]{2}",
    "1e999999999",
    "__import__('os').system('true')",
    "open('x','w')",
    "import os",
    "lambda: 1",
    "`ls`",
    "5\x00",
    "5\u202e",
    "5\ud800",
]
HARMLESS = [
    r"\lambda + 1",
    r"e^{-x^2/2}",
    "2^{2^n}",
    "2^{2^3}",
    "x^{2024}",
    "x^{100} + x^{99} + x^{98} + 1",
    "(x^2+1)^{10}",
    "5! + 10!",
    "n!",
    "(n+1)!",
    r"\binom{20}{10}",
    r"\binom{n}{k}",
    "1234567890123456789",
    r"\text{important}",
    r"\sqrt[3]{2}",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1}",
]


@pytest.mark.parametrize("prediction", HOSTILE)
def test_hostile_answers_are_refused(prediction: str) -> None:
    assert is_hostile(prediction)


@pytest.mark.parametrize("prediction", HARMLESS)
def test_ordinary_answers_pass(prediction: str) -> None:
    assert not is_hostile(prediction)
