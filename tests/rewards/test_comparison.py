from __future__ import annotations

import pytest

from megatron_oreal.rewards.algebra import ExactAlgebra
from megatron_oreal.rewards.algebra_needed import AlgebraNeeded
from megatron_oreal.rewards.comparison import is_same
from megatron_oreal.rewards.spelling import normalize


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("2", "3", False),
        ("0.333333", r"\frac{1}{3}", False),
        (r"10\%", "10", False),
        (r"5 \text{ million}", "5", False),
        ("(1,2)", "1,2", False),
        ("1,2", "(1,2)", False),
        ("(1,2)", r"\{1,2\}", False),
        ("52_7", "52_8", False),
        ("B", r"\text{(C)}", False),
        ("odd", r"\text{even}", False),
        ("H", "G", False),
        (r"(\mathbf{J})", "I", False),
        ("5 or 6", "5", False),
        ("3, 2, 1", "a=1, b=2, c=3", False),
        ("SPQR", "PQRS", False),
        ("x=5", "5", True),
        ("5", "x = 5", True),
        ("52", "52_8", True),
        ("evelyn", r"\text{Evelyn}", True),
        ("i", "I", True),
        ("2,1", "1,2", True),
        ("3, 2", r"\{2,3\}", True),
        (r"(\text{B}) 42", "B", True),
        (r"12 \text{ cm}", "12", True),
    ],
)
def test_what_takes_no_algebra(prediction: str, answer: str, expected: bool) -> None:
    assert is_same(normalize(prediction), normalize(answer)) is expected


@pytest.mark.parametrize(
    ("prediction", "answer"), [("x+1", "1+x"), ("y=5x", "x=5y"), (r"\sqrt{4}", "2"), ("[1,2]", "[1,3]"), ("2x=4", "2")]
)
def test_the_rest_is_left_to_algebra(prediction: str, answer: str) -> None:
    with pytest.raises(AlgebraNeeded):
        is_same(normalize(prediction), normalize(answer))


def test_what_our_parser_does_not_read_goes_to_the_fallback() -> None:
    asked: list[tuple[str, str]] = []

    def fallback(prediction: str, reference: str) -> bool:
        asked.append((prediction, reference))
        return True

    product = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1&0\\0&1\end{pmatrix}"
    matrix = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"
    assert is_same(product, matrix, ExactAlgebra(fallback))
    assert asked == [(product, matrix)]
    assert not is_same(product, matrix, ExactAlgebra())
    assert not is_same("x+1", "x+2", ExactAlgebra(fallback))
    assert len(asked) == 1
