r"""Computes the outcome reward: whether the last `\boxed{...}` of a response equals the reference answer.

The cheapest comparison comes first: equal spellings, then exact numbers, then the algebra system in worker processes,
for answers that pass a screen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oreal.config import AnswerRule
from megatron_oreal.observability.closing import Closing
from megatron_oreal.rewards.algebra_needed import AlgebraNeeded
from megatron_oreal.rewards.answer import ANSWER_REGIONS, MAX_NESTING, extract_answer, nesting_depth
from megatron_oreal.rewards.comparison import is_same
from megatron_oreal.rewards.hostile_input import is_hostile
from megatron_oreal.rewards.plain_numbers import parse_number
from megatron_oreal.rewards.references import prepare_reference
from megatron_oreal.rewards.scalars import spelled_alike
from megatron_oreal.rewards.spelling import normalize
from megatron_oreal.rewards.worker_pool import Comparison, Outcome, WorkerPool
from megatron_oreal.types import Metrics, Prompt, Verdict, VerdictStatus

DEFAULT_MAX_TIMEOUTS = 1
NUM_CONCURRENT_GROUPS = 4  # so that one slow comparison does not delay other groups

STATUS_OF_OUTCOME: dict[Outcome, VerdictStatus] = {
    "equal": "correct",
    "different": "incorrect",
    "timeout": "timeout",
    "slow_reference": "timeout",
    "crash": "crash",
}


class MathVerifier(Closing):
    """Judges responses against reference answers; a context manager, because it may own processes.

    num_workers: processes for comparisons that need algebra; none starts before the first such comparison.
    cpu_seconds: limit on the CPU time of one such comparison; beyond it, the verdict is "timeout".
    wall_seconds: limit for a process that hangs without using the CPU; 30 + 30 * cpu_seconds if None.
    max_timeouts: number of answers per reference in one `verify_many` that may be a "timeout"; if there are more, all
        of them are "rejected", unless the reference itself is slow.
    answer_rule: where `verify_responses` looks for the answer.

    Statuses: "correct", "incorrect", "no_answer" (no, empty or unclosed box), "too_long" (over 1000 characters) and
    "rejected" (nested over 50 deep, refused by the screen, or one of too many that are slow to check) are verdicts;
    "timeout" and "crash" mean that there is no verdict.
    """

    def __init__(
        self,
        num_workers: int = 1,
        cpu_seconds: float = 3.0,
        wall_seconds: float | None = None,
        max_timeouts: int = DEFAULT_MAX_TIMEOUTS,
        answer_rule: AnswerRule = "last_box",
    ) -> None:
        if max_timeouts < 0:
            raise ValueError(f"verifier.max_timeouts must be >= 0, got {max_timeouts}")
        self.max_timeouts = max_timeouts
        self.region = ANSWER_REGIONS[answer_rule]
        self.pool = WorkerPool(num_workers, cpu_seconds, wall_seconds)

    def verify(self, response: str, answer: str) -> Verdict:
        """See `verify_many`."""
        return self.verify_many([(response, answer)])[0]

    def verify_many(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        r"""Returns verdicts on (response, reference answer) pairs, in the given order.

        A reference may be inside a `\boxed{...}`. Raises ValueError for an empty or oversized reference, RuntimeError
        if workers cannot be started or the verifier is closed.
        """
        judgements = [judge_without_algebra(response, answer) for response, answer in pairs]
        undecided = [judgement for judgement in judgements if isinstance(judgement, Undecided)]
        # The samples of a group often agree, so each distinct pair is compared once.
        comparisons = list(dict.fromkeys(judgement.comparison for judgement in undecided))
        outcomes = dict(zip(comparisons, self.pool.compare_many(comparisons), strict=True)) if comparisons else {}
        timeouts = Counter(
            judgement.comparison.answer for judgement in undecided if outcomes[judgement.comparison] == "timeout"
        )
        return [
            make_verdict(self.status(judgement.comparison, outcomes, timeouts), judgement.extracted)
            if isinstance(judgement, Undecided)
            else judgement
            for judgement in judgements
        ]

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        """Returns verdicts on the whole responses to one prompt, see `Verifier`."""
        return self.verify_many([(self.region(response), prompt.answer) for response in responses])

    @property
    def num_concurrent(self) -> int:
        return NUM_CONCURRENT_GROUPS

    def check(self) -> None:
        """Does nothing: workers start when needed, and the reader of the prompts has checked the references."""

    def flush_metrics(self) -> Metrics:
        return {}

    def status(
        self, comparison: Comparison, outcomes: Mapping[Comparison, Outcome], timeouts: Mapping[str, int]
    ) -> VerdictStatus:
        """Returns the status; if too many answers to a prompt are slow to check, those are "rejected"."""
        outcome = outcomes[comparison]
        if outcome == "timeout" and timeouts[comparison.answer] > self.max_timeouts:
            return "rejected"
        return STATUS_OF_OUTCOME[outcome]

    def close(self) -> None:
        """Ends the worker processes. No method may be called afterwards."""
        self.pool.close()


@dataclass(slots=True, frozen=True)
class Undecided:
    """An answer that only the algebra system can judge."""

    extracted: str
    comparison: Comparison


def make_verdict(status: VerdictStatus, extracted: str | None) -> Verdict:
    return Verdict(1.0 if status == "correct" else 0.0, status, extracted)


def judge_without_algebra(response: str, answer: str) -> Verdict | Undecided:
    reference = prepare_reference(answer)
    extraction = extract_answer(response)
    if extraction.status != "found":
        return make_verdict(extraction.status, extraction.text)
    text = extraction.text
    assert text is not None
    if nesting_depth(text) > MAX_NESTING:
        return make_verdict("rejected", text)
    prediction = normalize(text)
    if spelled_alike(prediction, reference.text):
        return make_verdict("correct", text)
    values = parse_number(prediction), parse_number(reference.text)
    if values[0] is not None and values[1] is not None:
        return make_verdict("correct" if values[0] == values[1] else "incorrect", text)
    if is_hostile(text) or is_hostile(prediction):
        return make_verdict("rejected", text)
    if reference.is_spelling_only:
        return make_verdict("incorrect", text)
    try:
        return make_verdict("correct" if is_same(prediction, reference.text) else "incorrect", text)
    except AlgebraNeeded:
        return Undecided(text, Comparison(reference.text, prediction))
