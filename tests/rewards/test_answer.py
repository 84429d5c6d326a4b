from __future__ import annotations

import time

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


def test_nesting_counts_open_groups_too() -> None:
    assert nesting_depth("a") == 0
    assert nesting_depth("{[()]}{}") == 3
    assert nesting_depth("(" * 60) == 60


def test_answers_of_one_spelling_or_one_number_share_a_key() -> None:
    groups = [
        [r"\frac{1}{2}", "0.5", r"\dfrac12", "1/2", r"50\%", "$0.50$"],
        ["1,000", "1000", r"1000\text{ meters}", "10^3"],
        ["(A)", "A", "A)", r"\text{A}", "A.", r"(\text{A})", "a"],
        ["x + 1", "x+1"],
        ["(1, 2)", "(1,2)", r"\left(1,2\right)"],
        ["1+x"],  # only algebra finds it equal to x+1
        ["10^{1000}"],
        ["{" * 60 + "1" + "}" * 60],
        [""],
        ["x=5", "5", "5.0"],
        ["1,2", "2, 1", r"\{1,2\}"],
        [r"\sqrt8", r"2\sqrt{2}"],
        [r"7 \text{ a.m.}", "7 am"],
        [r"7 \text{ p.m.}"],
        ["2^{2024}-1", "-1+2^{2024}"],
        ["2^{2025}-1"],
        ["East", r"\text{east}"],
    ]
    keys = [{answer_key(text) for text in group} for group in groups]
    assert [len(group) for group in keys] == [1] * len(groups)
    assert len(set.union(*keys)) == len(groups)


@pytest.mark.parametrize(("text", "depth"), [("", 0), ("{}{}", 1), ("(()", 2), ("}}{", 1), ("[{()}]()", 3)])
def test_nesting_depth(text: str, depth: int) -> None:
    assert nesting_depth(text) == depth
