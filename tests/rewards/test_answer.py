from __future__ import annotations

import time
from fractions import Fraction

import pytest

from megatron_oreal.rewards.answer import answer_key, extract_answer, nesting_depth


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"So \boxed{5}.", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed { 7 }", "7"),
        (r"\fbox{7}", "7"),
        (r"\\boxed{7}", "7"),
        (r"{ an open brace, \boxed{3}", "3"),
        (r"a closing one } and \boxed{3}", "3"),
        (r"\boxed{1 + \boxed{2}}", r"1 + \boxed{2}"),
        (r"\boxed{ \boxed{5}", "5"),
        (r"\boxed{1}</think>The answer is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> \boxed{2}</think> \boxed{3}", "3"),
    ],
)
def test_the_last_balanced_box_is_the_answer(response: str, answer: str) -> None:
    extraction = extract_answer(response)
    assert (extraction.status, extraction.text) == ("found", answer)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "5",
        r"\boxed{}",
        r"\boxed{ }",
        r"\boxed{5",
        r"\boxed{1} and \boxed{2",
        r"\boxed{1}</think> so 1",
        r"\boxed 5",
    ],
)
def test_without_a_closed_last_box_there_is_no_answer(response: str) -> None:
    assert extract_answer(response).status == "no_answer"


def test_answers_are_capped_before_anything_reads_them() -> None:
    assert extract_answer(rf"\boxed{{{'1' * 1000}}}").status == "found"
    extraction = extract_answer(rf"\boxed{{{'1' * 1001}}}")
    assert extraction.status == "too_long"
    assert extraction.text is not None and len(extraction.text) == 1000


@pytest.mark.parametrize("response", [r"\boxed{" * 50_000, "\\" * 10**6, "{" * 10**6, r"\boxed{" + "1" * 10**6 + "}"])
def test_extraction_is_linear(response: str) -> None:
    started = time.process_time()
    extract_answer(response)
    assert time.process_time() - started < 5.0


@pytest.mark.parametrize(
    "answer",
    [
        "^" * 1000,
        "(x^{" * 40 + "2" + "})^{9}" * 40,
        r"\frac" * 200,
        r"\text{" * 160,
        " " * 1000,
        "1," * 500,
        "1%" * 500,
    ],
)
def test_normalisation_and_comparison_are_bounded(answer: str) -> None:
    started = time.process_time()
    compare(normalize(answer), "5")
    assert time.process_time() - started < 1.0


def test_nesting_counts_open_groups_too() -> None:
    assert nesting_depth("a") == 0
    assert nesting_depth("{[()]}{}") == 3
    assert nesting_depth("(" * 60) == 60


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (r"\dfrac{1}{2}", r"\frac12"),
        (r"\tfrac 1 2", r"\frac{1}{2}"),
        (r"\sqrt5", r"\sqrt{5}"),
        (r"$x + 1$.", "x+1"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"\text{(C)}", "C"),
        (r"\textbf{(C)}", "(C)"),
        (r"4210_{5}", "4210_5"),
        (r"\mathbf{x}", r"\text{x}"),
        ("+5x", "5x"),
        ("x = 5y", "5y"),
        (r"x \in [-2,7]", "[-2,7]"),
        ("{x}", "x"),
        (r"a \times b", r"a \cdot b"),
        (r"-2 ≤ x ≤ 7", r"-2 \le x \leqslant 7"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        ("(1, 2)", "(1,2)"),
    ],
)
def test_spellings_of_one_answer(one: str, other: str) -> None:
    assert compare(normalize(one), normalize(other)) is True
    assert compare(normalize(other), normalize(one)) is True


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
        (r"\frac{270}7\text{ degrees}", Fraction(270, 7)),
        (r"1\frac{4}{5}", Fraction(9, 5)),
        ("137 1/2", Fraction(275, 2)),
        (r"\$32,\!348", Fraction(32348)),
        (r"\$18.90", Fraction(189, 10)),
        (r"90^\circ", Fraction(90)),
        ("90°", Fraction(90)),
        (r"864 \mbox{ inches}^2", Fraction(864)),
        (r"15\text{ cm}^2", Fraction(15)),
        ("18 dollars", Fraction(18)),
        (r"10\%", Fraction(1, 10)),
        ("10%", Fraction(1, 10)),
        (r"10 \text{ percent}", Fraction(1, 10)),
        (r"5 \text{ million}", Fraction(5_000_000)),
        ("2^{10}", Fraction(1024)),
        ("2^{-3}", Fraction(1, 8)),
        (r"1.5 \times 10^{3}", Fraction(1500)),
        ("1/2^{99}", Fraction(1, 2**99)),
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
        "1e5",
        "10^{1001}",
        "9^9^9",
        "9^{999999}",
        f"{'9' * 30}^{{999}}",
        "1" * 1001,
        "0^{-1}",
        "3x",
        "52_8",
    ],
)
def test_what_is_no_plain_number(text: str) -> None:
    assert parse_number(normalize(text)) is None


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("2", "3"),
        ("0.333333", r"\frac{1}{3}"),
        (r"10\%", "10"),
        (r"5 \text{ million}", "5"),
        ("1/2^{99}", "1/2^{98}"),
        ("(1,2)", "1,2"),
        ("1,2", "(1,2)"),
        ("(1,2)", r"\{1,2\}"),
        ("52_7", "52_8"),
        ("5 6", "11"),
        ("B", r"\text{(C)}"),
        ("odd", r"\text{even}"),
        ("H", "G"),
        (r"(\mathbf{J})", "I"),
    ],
)
def test_differences_that_take_no_algebra(prediction: str, answer: str) -> None:
    assert compare(normalize(prediction), normalize(answer)) is False


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("x=5", "5"),
        ("5", "x = 5"),
        ("0.5", r"\frac12"),
        ("52", "52_8"),
        ("evelyn", r"\text{Evelyn}"),
        ("3.0", "3"),
        ("i", "I"),
    ],
)
def test_equalities_that_take_no_algebra(prediction: str, answer: str) -> None:
    assert compare(normalize(prediction), normalize(answer)) is True


@pytest.mark.parametrize(
    ("prediction", "answer"), [("x+1", "1+x"), ("y=5x", "x=5y"), ("2,1", "1,2"), ("[1,2]", "(1,2)")]
)
def test_the_rest_is_left_to_algebra(prediction: str, answer: str) -> None:
    assert compare(normalize(prediction), normalize(answer)) is None


def test_answers_of_one_spelling_or_one_number_share_a_key() -> None:
    groups = [
        [r"\frac{1}{2}", "0.5", r"\dfrac12", "1/2", r"50\%", "$0.50$"],
        ["1,000", "1000", r"1000\text{ meters}", "10^3"],
        ["(A)", "A", "A)", r"\text{A}", "A.", r"(\text{A})"],
        ["x + 1", "x+1"],
        ["(1, 2)", "(1,2)", r"\left(1,2\right)"],
        ["1+x"],  # only algebra finds it equal to x+1
        ["a"],
        ["10^{1000}"],
        ["{" * 60 + "1" + "}" * 60],
        [""],
    ]
    keys = [{answer_key(text) for text in group} for group in groups]
    assert [len(group) for group in keys] == [1] * len(groups)
    assert len(set.union(*keys)) == len(groups)
