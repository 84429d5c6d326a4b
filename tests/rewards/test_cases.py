"""Answers of every kind of fault that public reports name, each with what is right under the documented conventions."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.references import check_reference

CASES = [
    json.loads(line) for line in (Path(__file__).parent / "cases" / "by_kind.jsonl").read_text("utf-8").splitlines()
]
KINDS = sorted({case["kind"] for case in CASES})


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], tuple[bool, bool]]:
    """(response, answer) -> whether it is judged, whether it is rewarded."""
    pairs = [(case["response"], case["answer"]) for case in CASES]
    with MathVerifier(num_workers=2) as verifier:
        verdicts = verifier.verify_many(pairs)
    return {pair: (verdict.is_judged, verdict.reward == 1.0) for pair, verdict in zip(pairs, verdicts, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_every_case_of_a_kind_is_judged_right(kind: str, outcomes: dict[tuple[str, str], tuple[bool, bool]]) -> None:
    wrong = [
        (case["answer"], case["response"], case["expected"])
        for case in CASES
        if case["kind"] == kind and outcomes[case["response"], case["answer"]] != (True, case["expected"])
    ]
    assert wrong == []


def test_there_are_enough_cases_of_every_kind() -> None:
    counts = Counter(case["kind"] for case in CASES)
    assert len(CASES) >= 400
    assert min(counts.values()) >= 30
    for expected in (True, False):
        assert min(Counter(c["kind"] for c in CASES if c["expected"] is expected).values()) >= 9


@pytest.mark.parametrize("answer", sorted({case["answer"] for case in CASES}))
def test_the_references_of_the_cases_pass_the_check(answer: str) -> None:
    check_reference(answer)
