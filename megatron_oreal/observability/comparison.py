"""Two evaluations of the same questions, question by question: is the difference more than chance?

Greedy answers: McNemar's exact test. Means of sampled answers: a paired bootstrap over the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.observability.evaluation_results import QuestionRecord, questions_path, read_questions
from megatron_oreal.observability.evaluation_statistics import (
    CONFIDENCE,
    NUM_RESAMPLES,
    Estimate,
    mcnemar_exact,
    paired_bootstrap,
)
from megatron_oreal.observability.report import format_table


@dataclass(slots=True, frozen=True)
class Comparison:
    dataset: str
    metric: str
    num_questions: int
    first: float
    second: float
    difference: Estimate  # second - first
    only_first: int | None  # questions that only the first run solved; None for means
    only_second: int | None
    p_value: float  # two-sided
    test: str


def compare_runs(
    first: Path, second: Path, confidence: float = CONFIDENCE, num_resamples: int = NUM_RESAMPLES
) -> list[Comparison]:
    """The datasets that both run directories hold. Raises ValueError where they share none or asked other questions."""
    names = [finished_datasets(run_dir) for run_dir in (first, second)]
    shared = [name for name in names[0] if name in names[1]]
    if not shared:
        raise ValueError(
            f"{first} and {second} share no dataset ({', '.join(names[0])}; {', '.join(names[1])}): "
            "evaluate both under the same names"
        )
    comparisons = []
    for name in shared:
        pairs = paired_questions(questions_path(first, name), questions_path(second, name))
        comparisons += compare_dataset(name, *pairs, confidence, num_resamples)
    return comparisons


def finished_datasets(run_dir: Path) -> list[str]:
    names = sorted(path.stem for path in (run_dir / "questions").glob("*.jsonl"))
    if not names:
        raise ValueError(f"{run_dir} holds no questions/*.jsonl; give a run directory of `megatron-oreal eval`")
    return names


def paired_questions(first: Path, second: Path) -> tuple[list[QuestionRecord], list[QuestionRecord]]:
    """The second file's questions in the order of the first's."""
    questions = read_questions(first)
    others = {question.id: question for question in read_questions(second)}
    for question in questions:
        other = others.get(question.id)
        if other is None or (other.prompt, other.answer) != (question.prompt, question.answer):
            what = "is not in" if other is None else "differs in"
            raise ValueError(f"question {question.id!r} of {first} {what} {second}: evaluate both on the same file")
    if len(others) != len(questions):
        raise ValueError(
            f"{second} holds {len(others)} questions and {first} {len(questions)}: evaluate both on the same ones"
        )
    return questions, [others[question.id] for question in questions]


def compare_dataset(
    name: str,
    first: Sequence[QuestionRecord],
    second: Sequence[QuestionRecord],
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
) -> list[Comparison]:
    comparisons = []
    solved = [
        [question.greedy.is_correct for question in questions if question.greedy] for questions in (first, second)
    ]
    if solved[0] and solved[1]:
        test = mcnemar_exact(solved[0], solved[1])
        paired = paired_bootstrap(solved[0], solved[1], confidence, num_resamples)
        comparisons.append(
            Comparison(
                dataset=name,
                metric="greedy",
                num_questions=len(first),
                first=sum(solved[0]) / len(first),
                second=sum(solved[1]) / len(first),
                difference=paired.difference,
                only_first=test.only_first,
                only_second=test.only_second,
                p_value=test.p_value,
                test="McNemar",
            )
        )
    num_samples = [len(questions[0].samples) for questions in (first, second)]
    if all(num_samples):
        rates = [
            [q.num_correct / n for q in questions] for questions, n in zip((first, second), num_samples, strict=True)
        ]
        paired = paired_bootstrap(rates[0], rates[1], confidence, num_resamples)
        comparisons.append(
            Comparison(
                dataset=name,
                metric=" - ".join(dict.fromkeys(f"mean@{n}" for n in reversed(num_samples))),
                num_questions=len(first),
                first=sum(rates[0]) / len(first),
                second=sum(rates[1]) / len(first),
                difference=paired.difference,
                only_first=None,
                only_second=None,
                p_value=paired.p_value,
                test="bootstrap",
            )
        )
    return comparisons


def format_comparison(comparisons: Sequence[Comparison], confidence: float = CONFIDENCE) -> str:
    header = ["dataset", "questions", "metric", "A", "B", "B - A", f"{100 * confidence:g}% low", "high"]
    rows = [
        [c.dataset, c.num_questions, c.metric, c.first, c.second, c.difference.value, c.difference.low]
        + [c.difference.high, c.only_first, c.only_second, c.p_value, c.test]
        for c in comparisons
    ]
    return format_table(rows, [*header, "only A", "only B", "p", "test"])
