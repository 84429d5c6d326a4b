"""Summaries and comparisons of hand-made answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_oreal.config import BenchmarkConfig
from megatron_oreal.evaluation.comparison import compare_runs, format_comparison
from megatron_oreal.evaluation.results import (
    AnswerRecord,
    QuestionRecord,
    format_results,
    questions_path,
    read_questions,
    summarize,
    write_questions,
    write_results,
)


def answer(mark: str, vote: int | None = None) -> AnswerRecord:
    """c: correct, w: wrong and cut, n: without an answer, t: the verifier timed out."""
    status = {"c": "correct", "w": "incorrect", "n": "no_answer", "t": "timeout"}[mark]
    length, reason = {"c": (10, "stop"), "w": (20, "length")}.get(mark, (30, "stop"))
    extracted = None if mark == "n" else mark
    return AnswerRecord(mark == "c", mark != "t", status, extracted, vote, length, reason, f"\\boxed{{{mark}}}")


def question(number: int, greedy: str, samples: str) -> QuestionRecord:
    votes = [None if mark == "n" else samples.index(mark) for mark in samples]
    answers = [answer(mark, vote) for mark, vote in zip(samples, votes, strict=True)]
    return QuestionRecord(f"q{number}", f"{number}?", "1", answer(greedy) if greedy else None, answers)


QUESTIONS = [question(0, "c", "ccww"), question(1, "w", "cwnn"), question(2, "t", "wwwt"), question(3, "c", "cccc")]
CONFIG = BenchmarkConfig(prompts={"sums": Path("sums.jsonl")}, num_samples=4)


def test_the_metrics_by_hand() -> None:
    summary = summarize(QUESTIONS, CONFIG)
    values = {name: estimate.value for name, estimate in summary.metrics.items()}
    assert values == pytest.approx(
        {
            "greedy": 2 / 4,
            "mean@4": (2 / 4 + 1 / 4 + 0 + 1) / 4,
            "pass@2": (5 / 6 + 3 / 6 + 0 + 1) / 4,
            "pass@4": 3 / 4,
            "maj@4": (0.5 + 0.5 + 0 + 1) / 4,  # two ties
        }
    )
    for estimate in summary.metrics.values():
        assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert summary.greedy is not None and summary.sampled is not None
    assert (summary.greedy.num_answers, summary.greedy.num_unjudged) == (4, 1)
    assert summary.greedy.length_incorrect_mean == 20  # the unjudged one is not among the incorrect
    assert summary.greedy.finish_reasons == {"length": 1, "stop": 3}
    assert summary.sampled.statuses == {"correct": 7, "incorrect": 6, "no_answer": 2, "timeout": 1}
    assert summary.sampled.length_mean == (7 * 10 + 6 * 20 + 3 * 30) / 16


def test_what_was_not_measured_is_left_out() -> None:
    greedy_only = summarize([question(0, "c", "")], CONFIG.model_copy(update={"num_samples": 0}))
    assert list(greedy_only.metrics) == ["greedy"] and greedy_only.sampled is None
    sampled_only = summarize([question(0, "", "w")], CONFIG.model_copy(update={"num_samples": 1, "greedy": False}))
    assert list(sampled_only.metrics) == ["mean@1"] and sampled_only.greedy is None
    assert sampled_only.sampled is not None and sampled_only.sampled.length_correct_mean is None


def test_files_keep_what_was_written(tmp_path: Path) -> None:
    path = questions_path(tmp_path, "sums")
    write_questions(path, QUESTIONS)
    assert read_questions(path) == QUESTIONS
    summaries = {"sums": summarize(QUESTIONS, CONFIG)}
    write_results(tmp_path / "results.json", Path("model"), summaries, ["skipped 1 prompt"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["datasets"]["sums"]["metrics"]["greedy"]["value"] == 0.5
    table = format_results(summaries, 0.95)
    assert "95% low" in table and "maj@4" in table and "no answer" in table


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = questions_path(tmp_path, "sums")
    write_questions(path, QUESTIONS)
    path.write_bytes(path.read_bytes() + b'{"id": "q4"}\n')
    with pytest.raises(ValueError, match=r"sums\.jsonl line 5 is no question's record .*; remove the file"):
        read_questions(path)


def run_of(folder: Path, questions: list[QuestionRecord], dataset: str = "sums") -> Path:
    write_questions(questions_path(folder, dataset), questions)
    return folder


def test_two_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    worse = [question(number, "w", "wwww") for number in range(6)] + [question(6, "c", "cccc")]
    better = [question(number, "c", "cwwc") for number in range(6)] + [question(6, "w", "cccc")]
    first, second = run_of(tmp_path / "a", worse), run_of(tmp_path / "b", better[::-1])  # the order does not matter
    greedy, means = compare_runs(first, second)
    assert (greedy.first, greedy.second, greedy.only_first, greedy.only_second) == (1 / 7, 6 / 7, 1, 6)
    assert greedy.p_value == 0.125 and greedy.test == "McNemar"
    assert means.metric == "mean@4" and means.difference.value == pytest.approx(3 / 7)
    assert means.difference.low > 0 and means.p_value < 0.05
    lines = format_comparison([greedy, means]).splitlines()
    assert len(lines) == 4 and lines[0].split()[-1] == "test"


def test_a_comparison_of_other_questions_is_refused(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", QUESTIONS)
    with pytest.raises(ValueError, match=r"holds no questions/\*\.jsonl; give a run directory of"):
        compare_runs(first, tmp_path)
    with pytest.raises(ValueError, match=r"share no dataset \(sums; products\)"):
        compare_runs(first, run_of(tmp_path / "b", QUESTIONS, "products"))
    with pytest.raises(ValueError, match=r"question 'q3' of .* is not in .*: evaluate both on the same file"):
        compare_runs(first, run_of(tmp_path / "c", QUESTIONS[:3]))
    with pytest.raises(ValueError, match=r"holds 5 questions and .* 4: evaluate both on the same ones"):
        compare_runs(first, run_of(tmp_path / "d", [*QUESTIONS, question(4, "c", "cccc")]))
    other = question(9, "c", "cccc")
    changed = [*QUESTIONS[:3], QuestionRecord("q3", "other?", "1", other.greedy, other.samples)]
    with pytest.raises(ValueError, match=r"question 'q3' of .* differs in"):
        compare_runs(first, run_of(tmp_path / "e", changed))
