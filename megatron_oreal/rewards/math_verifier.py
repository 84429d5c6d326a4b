r"""The outcome reward: does the last `\boxed{...}` of a response equal the reference answer?

Cheapest first: equal spellings, exact numbers, and only then the algebra system, after a screen, in worker processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oreal.observability.closing import Closing
from megatron_oreal.rewards import answer as answers
from megatron_oreal.rewards.hostile_input import is_hostile
from megatron_oreal.rewards.worker_pool import Comparison, Outcome, WorkerPool
from megatron_oreal.types import Verdict, VerdictStatus

MAX_REFERENCE_CHARACTERS = 10_000

STATUS_OF_OUTCOME: dict[Outcome, VerdictStatus] = {
    "equal": "correct",
    "different": "incorrect",
    "timeout": "timeout",
    "crash": "crash",
}


class MathVerifier(Closing):
    """Judges responses against reference answers; a context manager, because it may own processes.

    num_workers: processes for comparisons that take algebra; none is started before the first of them.
    cpu_seconds: CPU time of one such comparison, then its verdict is "timeout".
    wall_seconds: a limit for what hangs without computing; 30 + 30 * cpu_seconds when None.

    Statuses: "correct", "incorrect", "no_answer" (no, empty or unclosed box), "too_long" (over 1000 characters) and
    "rejected" (nested over 50 deep, or refused by the screen) are judged; "timeout" and "crash": there is no verdict.
    """

    def __init__(self, num_workers: int = 1, cpu_seconds: float = 3.0, wall_seconds: float | None = None) -> None:
        self.pool = WorkerPool(num_workers, cpu_seconds, wall_seconds)

    def verify(self, response: str, answer: str) -> Verdict:
        """See `verify_many`."""
        return self.verify_many([(response, answer)])[0]

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        r"""Verdicts on (response, reference answer) pairs, in their order.

        A reference may stand in a `\boxed{...}` of its own. Errors: ValueError for an empty or endless reference,
        RuntimeError when workers cannot be started or the verifier is closed.
        """
        judgements = [judge_without_algebra(response, answer) for response, answer in pairs]
        # The samples of a group often agree; each question is asked once.
        comparisons = list(
            dict.fromkeys(judgement.comparison for judgement in judgements if isinstance(judgement, Undecided))
        )
        outcomes = dict(zip(comparisons, self.pool.compare_many(comparisons), strict=True)) if comparisons else {}
        return [
            make_verdict(STATUS_OF_OUTCOME[outcomes[judgement.comparison]], judgement.extracted)
            if isinstance(judgement, Undecided)
            else judgement
            for judgement in judgements
        ]

    def close(self) -> None:
        """Ends the worker processes. The verifier cannot be used afterwards."""
        self.pool.close()


@dataclass(slots=True, frozen=True)
class Undecided:
    """What it takes to judge an answer."""

    extracted: str
    comparison: Comparison


def make_verdict(status: VerdictStatus, extracted: str | None) -> Verdict:
    return Verdict(1.0 if status == "correct" else 0.0, status, extracted)


def judge_without_algebra(response: str, answer: str) -> Verdict | Undecided:
    reference = normalized_reference(answer)
    extraction = answers.extract_answer(response)
    if extraction.status != "found":
        return make_verdict(extraction.status, extraction.text)
    text = extraction.text
    assert text is not None
    if answers.nesting_depth(text) > answers.MAX_NESTING:
        return make_verdict("rejected", text)
    prediction = answers.normalize(text)
    agree = answers.compare(prediction, reference)
    if agree is not None:
        return make_verdict("correct" if agree else "incorrect", text)
    if is_hostile(text) or is_hostile(prediction):
        return make_verdict("rejected", text)
    return Undecided(
        text, Comparison(answers.spell_out_percentages(reference), answers.spell_out_percentages(prediction))
    )


def normalized_reference(answer: str) -> str:
    if len(answer) > MAX_REFERENCE_CHARACTERS:
        raise ValueError(f"answer must be at most {MAX_REFERENCE_CHARACTERS} characters long, got {len(answer)}")
    boxed = answers.extract_answer(answer) if r"\boxed" in answer else None
    reference = answers.normalize(boxed.text if boxed is not None and boxed.text else answer)
    if not reference:
        raise ValueError(f"answer must not be empty: give each prompt a reference answer, got {answer!r}")
    return reference
