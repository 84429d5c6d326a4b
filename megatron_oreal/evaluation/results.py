"""Defines, writes and reads an evaluation's files: one JSON object for each question, and their summary."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_oreal.config import BenchmarkConfig
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.reports.curves import format_table
from megatron_oreal.statistics import Estimate, bootstrap_mean, majority_at_k, pass_at_k


@dataclass(slots=True, frozen=True)
class AnswerRecord:
    """One answer and the verifier's verdict on it."""

    is_correct: bool
    is_judged: bool  # False: the verifier could not decide; counted as wrong
    status: str
    extracted: str | None
    vote: int | None  # the first sample of the question with the same answer; None where there is no answer
    num_tokens: int
    finish_reason: str
    response: str | None  # None where eval.keep_responses is off


@dataclass(slots=True, frozen=True)
class QuestionRecord:
    id: str
    prompt: str  # the last message
    answer: str
    greedy: AnswerRecord | None
    samples: list[AnswerRecord]

    @property
    def num_correct(self) -> int:
        return sum(sample.is_correct for sample in self.samples)


QUESTION = TypeAdapter(QuestionRecord)


@dataclass(slots=True, frozen=True)
class AnswerCounts:
    """Lengths (in tokens) and outcomes of all greedy, or all sampled, answers to a dataset."""

    num_answers: int
    length_mean: float
    length_max: int
    length_correct_mean: float | None  # None: there is no such answer
    length_incorrect_mean: float | None
    num_unjudged: int
    finish_reasons: dict[str, int]
    statuses: dict[str, int]


@dataclass(slots=True, frozen=True)
class DatasetSummary:
    num_questions: int
    metrics: dict[str, Estimate]  # greedy, mean@n, pass@k, maj@k: shares of the questions, in [0, 1]
    greedy: AnswerCounts | None
    sampled: AnswerCounts | None


def questions_path(run_dir: Path, dataset: str) -> Path:
    return run_dir / "questions" / f"{dataset}.jsonl"


def write_questions(path: Path, questions: Sequence[QuestionRecord]) -> None:
    """Writes the file whole or not at all: where it exists, its dataset is finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions))


def read_questions(path: Path) -> list[QuestionRecord]:
    """Reads what `write_questions` wrote. Raises ValueError that names the line where the file is something else."""
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            questions.append(QUESTION.validate_json(line))
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise ValueError(f"{path} line {number} is no question's record ({reason}); remove the file") from None
    if not questions:
        raise ValueError(f"{path} is empty; remove the file and evaluate again")
    return questions


def summarize(questions: Sequence[QuestionRecord], config: BenchmarkConfig) -> DatasetSummary:
    """Computes all metrics of a dataset; each interval resamples the same questions."""
    n = config.num_samples
    values: dict[str, list[float]] = {}
    if config.greedy:
        values["greedy"] = [float(question.greedy is not None and question.greedy.is_correct) for question in questions]
    if n:
        values[f"mean@{n}"] = [question.num_correct / n for question in questions]
    for k in config.pass_counts:
        values[f"pass@{k}"] = [pass_at_k(question.num_correct, n, k) for question in questions]
    for k in config.majority_counts:
        values[f"maj@{k}"] = [majority(question, k) for question in questions]
    return DatasetSummary(
        num_questions=len(questions),
        metrics={name: bootstrap_mean(v, config.confidence, config.num_resamples) for name, v in values.items()},
        greedy=count_answers([question.greedy for question in questions if question.greedy is not None]),
        sampled=count_answers([sample for question in questions for sample in question.samples]),
    )


def majority(question: QuestionRecord, k: int) -> float:
    votes, is_correct = [sample.vote for sample in question.samples], [s.is_correct for s in question.samples]
    return majority_at_k(votes, is_correct, k)


def count_answers(answers: Sequence[AnswerRecord]) -> AnswerCounts | None:
    if not answers:
        return None
    lengths = [answer.num_tokens for answer in answers]
    return AnswerCounts(
        num_answers=len(answers),
        length_mean=sum(lengths) / len(lengths),
        length_max=max(lengths),
        length_correct_mean=mean([answer.num_tokens for answer in answers if answer.is_correct]),
        length_incorrect_mean=mean([a.num_tokens for a in answers if a.is_judged and not a.is_correct]),
        num_unjudged=sum(not answer.is_judged for answer in answers),
        finish_reasons=dict(sorted(Counter(answer.finish_reason for answer in answers).items())),
        statuses=dict(sorted(Counter(answer.status for answer in answers).items())),
    )


def mean(lengths: Sequence[int]) -> float | None:
    return sum(lengths) / len(lengths) if lengths else None


def write_results(path: Path, model: Path, summaries: Mapping[str, DatasetSummary], notes: Sequence[str]) -> None:
    """Writes the results. `notes` says what the evaluation left out."""
    datasets = {name: asdict(summary) for name, summary in summaries.items()}
    content = {"model": str(model), "notes": list(notes), "datasets": datasets}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def format_results(summaries: Mapping[str, DatasetSummary], confidence: float) -> str:
    """Formats two tables: the metrics with their intervals, and the lengths and outcomes of the answers."""
    interval = f"{100 * confidence:g}% low"
    metrics = [
        [name, summary.num_questions, metric, estimate.value, estimate.low, estimate.high]
        for name, summary in summaries.items()
        for metric, estimate in summary.metrics.items()
    ]
    counts = [
        [name, kind, *count_cells(answers)]
        for name, summary in summaries.items()
        for kind, answers in (("greedy", summary.greedy), ("sampled", summary.sampled))
        if answers is not None
    ]
    tables = [
        format_table(metrics, ["dataset", "questions", "metric", "value", interval, "high"]),
        format_table(
            counts,
            ["dataset", "answers", "number", "tokens", "correct", "incorrect", "longest", *COUNTED, "unjudged"],
        ),
    ]
    return "\n\n".join(tables)


COUNTED = ("stopped", "cut", "aborted", "no answer")


def count_cells(answers: AnswerCounts) -> list[float | None]:
    reasons = Counter(answers.finish_reasons)
    return [
        answers.num_answers,
        answers.length_mean,
        answers.length_correct_mean,
        answers.length_incorrect_mean,
        answers.length_max,
        reasons["stop"],
        reasons["length"],
        reasons["abort"],
        answers.statuses.get("no_answer", 0),
        answers.num_unjudged,
    ]
