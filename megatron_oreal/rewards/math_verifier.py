r"""The outcome reward: does the last `\boxed{...}` of a response equal the reference answer?

Cheapest first: equal spellings, exact numbers, and only then the algebra system, after a screen, in worker processes.
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
NUM_CONCURRENT_GROUPS = 4  # one slow comparison does not hold the other groups up

STATUS_OF_OUTCOME: dict[Outcome, VerdictStatus] = {
    "equal": "correct",
    "different": "incorrect",
    "timeout": "timeout",
    "slow_reference": "timeout",
    "crash": "crash",
}


class MathVerifier(Closing):
    """Judges responses against reference answers; a context manager, because it may own processes.

    num_workers: processes for comparisons that take algebra; none is started before the first of them.
    cpu_seconds: CPU time of one such comparison, then its verdict is "timeout".
    wall_seconds: a limit for what hangs without computing; 30 + 30 * cpu_seconds when None.
    max_timeouts: of the answers that `verify_many` compares with one reference, so many may be a "timeout"; where there
        are more, all of them are "rejected", unless the reference itself is slow.
    answer_rule: where `verify_responses` looks for the answer.

    Statuses: "correct", "incorrect", "no_answer" (no, empty or unclosed box), "too_long" (over 1000 characters) and
    "rejected" (nested over 50 deep, refused by the screen, or one of too many that are slow to check) are judged;
    "timeout" and "crash": there is no verdict.
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
        r"""Verdicts on (response, reference answer) pairs, in their order.

        A reference may stand in a `\boxed{...}` of its own. Errors: ValueError for an empty or endless reference,
        RuntimeError when workers cannot be started or the verifier is closed.
        """
        judgements = [judge_without_algebra(response, answer) for response, answer in pairs]
        undecided = [judgement for judgement in judgements if isinstance(judgement, Undecided)]
        # The samples of a group often agree; each question is asked once.
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
        """See `Verifier`: the whole responses to one prompt."""
        return self.verify_many([(self.region(response), prompt.answer) for response in responses])

    @property
    def num_concurrent(self) -> int:
        return NUM_CONCURRENT_GROUPS

    def check(self) -> None:
        """Nothing can be wrong: workers start when they are needed, and references were checked with the prompts."""

    def flush_metrics(self) -> Metrics:
        return {}

    def status(
        self, comparison: Comparison, outcomes: Mapping[Comparison, Outcome], timeouts: Mapping[str, int]
    ) -> VerdictStatus:
        """Answers that are slow to check count against their samples where there are many of them."""
        outcome = outcomes[comparison]
        if outcome == "timeout" and timeouts[comparison.answer] > self.max_timeouts:
            return "rejected"
        return STATUS_OF_OUTCOME[outcome]

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
