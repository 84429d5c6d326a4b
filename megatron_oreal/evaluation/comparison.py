"""Compares two evaluations of the same questions, question by question: is the difference more than chance?

Greedy answers: McNemar's exact test. Means of sampled answers: a paired bootstrap over the questions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_oreal.evaluation.results import QuestionRecord, questions_path, read_questions
from megatron_oreal.reports.curves import format_table
from megatron_oreal.statistics import CONFIDENCE, NUM_RESAMPLES, Estimate, mcnemar_exact, paired_bootstrap


@dataclass(slots=True, frozen=True)
class Comparison:
    dataset: str
    metric: str
    num_questions: int
    first: float
    second: float
    difference: Estimate  # the second run's value minus the first's
    only_first: int | None  # questions that only the first run solved; None for means
    only_second: int | None
    p_value: float  # two-sided
    test: str


def compare_runs(
    first: Path, second: Path, confidence: float = CONFIDENCE, num_resamples: int = NUM_RESAMPLES
) -> list[Comparison]:
    """Compares the datasets that both runs hold. Raises ValueError where they share none or asked other questions."""
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
    """Returns the second file's questions in the order of the first's."""
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
    """Compares each metric that both runs measured; both hold the same questions in the same order."""
    comparisons = []
    if first[0].greedy is not None and second[0].greedy is not None:
        comparisons.append(compare_greedy(name, first, second, confidence, num_resamples))
    if first[0].samples and second[0].samples:
        comparisons.append(compare_means(name, first, second, confidence, num_resamples))
    return comparisons


def compare_greedy(
    name: str,
    first: Sequence[QuestionRecord],
    second: Sequence[QuestionRecord],
    confidence: float,
    num_resamples: int,
) -> Comparison:
    solved_by_first, solved_by_second = solved(first), solved(second)
    test = mcnemar_exact(solved_by_first, solved_by_second)
    return Comparison(
        dataset=name,
        metric="greedy",
        num_questions=len(first),
        first=sum(solved_by_first) / len(first),
        second=sum(solved_by_second) / len(second),
        difference=paired_bootstrap(solved_by_first, solved_by_second, confidence, num_resamples).difference,
        only_first=test.only_first,
        only_second=test.only_second,
        p_value=test.p_value,
        test="McNemar",
    )


def solved(questions: Sequence[QuestionRecord]) -> list[bool]:
    return [question.greedy is not None and question.greedy.is_correct for question in questions]


def compare_means(
    name: str,
    first: Sequence[QuestionRecord],
    second: Sequence[QuestionRecord],
    confidence: float,
    num_resamples: int,
) -> Comparison:
    """Compares the runs' means over the same questions; the runs may have drawn different numbers of samples."""
    rates = [[question.num_correct / len(question.samples) for question in run] for run in (first, second)]
    paired = paired_bootstrap(rates[0], rates[1], confidence, num_resamples)
    metrics = dict.fromkeys(f"mean@{len(questions[0].samples)}" for questions in (first, second))
    return Comparison(
        dataset=name,
        metric=", ".join(metrics),
        num_questions=len(first),
        first=sum(rates[0]) / len(first),
        second=sum(rates[1]) / len(second),
        difference=paired.difference,
        only_first=None,
        only_second=None,
        p_value=paired.p_value,
        test="bootstrap",
    )


def format_comparison(comparisons: Sequence[Comparison], confidence: float = CONFIDENCE) -> str:
    columns: dict[str, Callable[[Comparison], object]] = {
        "dataset": lambda row: row.dataset,
        "questions": lambda row: row.num_questions,
        "metric": lambda row: row.metric,
        "A": lambda row: row.first,
        "B": lambda row: row.second,
        "B - A": lambda row: row.difference.value,
        f"{100 * confidence:g}% low": lambda row: row.difference.low,
        "high": lambda row: row.difference.high,
        "only A": lambda row: row.only_first,
        "only B": lambda row: row.only_second,
        "p": lambda row: row.p_value,
        "test": lambda row: row.test,
    }
    rows = [[cell(comparison) for cell in columns.values()] for comparison in comparisons]
    return format_table(rows, list(columns))
