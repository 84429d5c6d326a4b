"""Votes of hand-made samples."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.evaluation.benchmark import question_record
from megatron_oreal.types import Message, Prompt, Sample, Verdict


def sample(extracted: str | None) -> Sample:
    tokens = np.arange(2, 5, dtype=np.int32)
    verdict = Verdict(0.0, "no_answer" if extracted is None else "incorrect", extracted)
    return Sample("q", tokens, tokens, "", tokens[:0], tokens[:0], "stop", 0, verdict)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("extracted", "votes"),
    [
        (["2", "\\boxed{2}", "2.0"], [0, 0, 0]),  # one answer in three spellings
        (["1", "2", "\\frac{4}{2}", "1"], [0, 1, 1, 0]),
        ([None, "2", None, "3"], [None, 1, None, 3]),
        (["x", " x ", "y"], [0, 0, 2]),
    ],
)
def test_a_sample_votes_for_the_first_with_its_answer(extracted: list[str | None], votes: list[int | None]) -> None:
    prompt = EncodedPrompt(Prompt("q", (Message("user", "?"),), "2"), [2, 3])
    record = question_record(prompt, None, [sample(text) for text in extracted], keep_responses=False)
    assert [answer.vote for answer in record.samples] == votes
