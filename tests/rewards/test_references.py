from __future__ import annotations

import pytest

from megatron_oreal.rewards.hostile_input import refusal
from megatron_oreal.rewards.math_verifier import judge_without_algebra
from megatron_oreal.rewards.references import check_reference, prepare_reference
from megatron_oreal.rewards.spelling import normalize
from megatron_oreal.types import Verdict


@pytest.mark.parametrize(
    "answer", ["5", r"\boxed{5}", r"\text{east}", r"\sum_{k=1}^n k^2", "x=5", r"2+3=5", "1" * 1000, r"\{1,2\}", "(1,2]"]
)
def test_ordinary_references_pass(answer: str) -> None:
    check_reference(answer)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("$$", "empty"),
        (".", "empty"),
        (r"\boxed{}", "empty"),
        ("{}", "empty"),
        (" ; ", "empty"),
        ("1" * 1001, "at most 1000 characters"),
        ("(" * 51 + "1" + ")" * 51, "at most 50 deep"),
        (r"\frac{1}{2", "without their partners"),
        ("5}", "without their partners"),
        ("9^{9^{9}}^9", "exponent"),
        ("9^{9^{9^9}}", "exponent"),
        ("100000!", "factorial"),
        (r"\binom{100000}{5}", "binomial"),
        ("__import__('os')", "run as code"),
        ("5\u200b", "control character"),
        (r"\frac{1}{2}=0.6", "contradicts itself"),
        ("x=5=6", "contradicts itself"),
    ],
)
def test_references_that_nothing_could_equal_are_refused(answer: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_reference(answer)


def test_a_hostile_reference_is_only_compared_by_its_spelling() -> None:
    assert prepare_reference("9^{9^{9^9}}").is_spelling_only
    assert prepare_reference(r"\sum_{k=1}^n k").is_spelling_only
    assert prepare_reference("1" * 1001).is_spelling_only
    assert not prepare_reference("2^{10}").is_spelling_only
    assert prepare_reference(r"\boxed{\frac12}").text == r"\frac{1}{2}"


# Hostile as they are written alone, or only as they are read: 1\,000\,000 is a million, and lambda a Greek letter.
HOSTILE_IN_ONE_FORM = [
    "lambda: 0",
    r"1\,000\,000!",
    r"\binom{1\,000\,000\,000}{5}",
    r"2^{1\,000\,000\,000}",
    "9\u00b2\u2079\u2079\u2079\u2079",
    r"_\!_import_\!_",
]


@pytest.mark.parametrize("text", HOSTILE_IN_ONE_FORM)
def test_the_screen_looks_at_a_text_as_written_and_as_read(text: str) -> None:
    assert (refusal(text) is None) != (refusal(normalize(text)) is None)
    assert prepare_reference(text).is_spelling_only
    verdict = judge_without_algebra(rf"\boxed{{{text}}}", "x+1")
    assert isinstance(verdict, Verdict) and verdict.status == "rejected"
