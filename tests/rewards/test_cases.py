"""Answers of every kind of fault that public reports name, each with what is right under the documented conventions."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.references import check_reference

CASES = [
    json.loads(line) for line in (Path(__file__).parent / "cases" / "by_kind.jsonl").read_text("utf-8").splitlines()
]
README = Path(__file__).parents[2] / "megatron_oreal" / "rewards" / "README.md"
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


def documented_examples() -> list[tuple[str, str, bool]]:
    """(reference, answer, whether it is right) of the tables of conventions in the package's README."""
    examples = []
    for line in README.read_text("utf-8").partition("## Conventions")[2].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) == 4 and cells[0].startswith("`"):
            reference = cells[0].strip("`")
            for cell, is_right in ((cells[1], True), (cells[2], False)):
                examples += [(reference, answer, is_right) for answer in re.findall("`([^`]+)`", cell)]
    return examples


def test_the_documented_conventions_hold() -> None:
    examples = documented_examples()
    assert len(examples) > 120
    with MathVerifier() as verifier:
        verdicts = verifier.verify_many([(rf"\boxed{{{answer}}}", reference) for reference, answer, _ in examples])
    wrong = [
        example
        for example, verdict in zip(examples, verdicts, strict=True)
        if not verdict.is_judged or (verdict.reward == 1.0) != example[2]
    ]
    assert wrong == []
