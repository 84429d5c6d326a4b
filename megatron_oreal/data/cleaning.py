"""Cleans imported prompts by length, images, overlap with evaluation sets and duplicates, and reports what it found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_oreal.data.contamination import ContaminationIndex
from megatron_oreal.data.duplicates import Duplicates, Question, SameAnswer, find_exact, find_near
from megatron_oreal.data.files import Row, read_jsonl
from megatron_oreal.data.importing import Duplicates as DuplicatesChoice
from megatron_oreal.data.prompts import parse_messages
from megatron_oreal.data.question_text import has_image
from megatron_oreal.data.tokenizer import load_tokenizer
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.answer import answer_key


@dataclass(slots=True, frozen=True)
class CleaningSettings:
    duplicates: DuplicatesChoice = "keep"
    near_threshold: float = 0.8  # Jaccard similarity of two questions' sequences of three words
    evaluation_sets: tuple[Path, ...] = ()  # prompts files whose questions must not be trained on
    ngram: int = 13  # successive words that a contaminated question shares with one of these
    max_characters: int | None = None  # of a question
    max_tokens: int | None = None  # of a question, without the chat template
    tokenizer: Path | None = None
    drop_images: bool = False  # whether a question that links to an image is removed, or only counted


@dataclass(slots=True)
class Findings:
    """The prompts that each check found. A row is removed for one reason: the first that applies, in this order."""

    num_too_long: int = 0
    num_images: int = 0
    contaminated: list[tuple[str, str]] = field(default_factory=list)  # (prompt, evaluation question)
    exact: list[tuple[str, str]] = field(default_factory=list)  # (prompt, the one like it)
    near: list[tuple[str, str]] = field(default_factory=list)
    conflicts: list[list[dict[str, str]]] = field(default_factory=list)  # groups of {"id", "answer"}
    near_conflicts: list[list[dict[str, str]]] = field(default_factory=list)

    @property
    def num_conflicting(self) -> int:
        return sum(map(len, self.conflicts))


def clean(rows: Sequence[Row], settings: CleaningSettings) -> tuple[list[Row], Findings]:
    """Returns the rows that are kept, in their order. Raises ValueError for a bad evaluation set or tokenizer."""
    findings = Findings()
    kept = [row for row, is_long in zip(rows, too_long(rows, settings), strict=True) if not is_long]
    findings.num_too_long = len(rows) - len(kept)
    pictured = {row["id"] for row in kept if has_image(question_of(row))}
    findings.num_images = len(pictured)
    if settings.drop_images:
        kept = [row for row in kept if row["id"] not in pictured]
    if settings.evaluation_sets:
        index = read_evaluation_sets(settings.evaluation_sets, settings.ngram)
        found = [(row["id"], index.find(question_of(row))) for row in kept]
        findings.contaminated = [(id_, name) for id_, name in found if name is not None]
        contaminated = {id_ for id_, _ in findings.contaminated}
        kept = [row for row in kept if row["id"] not in contaminated]
    return without_duplicates(kept, settings, findings), findings


def without_duplicates(rows: list[Row], settings: CleaningSettings, findings: Findings) -> list[Row]:
    """Counts exact duplicates and conflicts with any settings, and removes those that the settings name.

    The first of several duplicates stays. A question with several answers is removed, since at most one is right.
    """
    questions = [Question(row["id"], question_of(row), row["answer"]) for row in rows]
    with comparing_answers() as same_answer:
        exact = find_exact(questions, same_answer)
        gone = {later for later, _ in exact.exact} | {index for group in exact.conflicts for index in group}
        near = Duplicates()
        if settings.duplicates == "near":
            left = [index for index in range(len(rows)) if index not in gone]
            near = find_near(questions, left, settings.near_threshold, same_answer)
            gone |= {later for later, _ in near.near}
    findings.exact = [(questions[later].id, questions[first].id) for later, first in exact.exact]
    findings.near = [(questions[later].id, questions[first].id) for later, first in near.near]
    findings.conflicts = [[answered(questions[index]) for index in group] for group in exact.conflicts]
    findings.near_conflicts = [[answered(questions[index]) for index in pair[::-1]] for pair in near.near_conflicts]
    if settings.duplicates == "keep":
        return rows
    return [row for index, row in enumerate(rows) if index not in gone]


def answered(question: Question) -> dict[str, str]:
    return {"id": question.id, "answer": question.answer}


def question_of(row: Row) -> str:
    """Returns the text of the user's messages, or of all messages if none is the user's."""
    messages = parse_messages(row)
    asked = [message.content for message in messages if message.role == "user"]
    return "\n".join(asked or [message.content for message in messages])


def too_long(rows: Sequence[Row], settings: CleaningSettings) -> list[bool]:
    texts = [question_of(row) for row in rows]
    found = [settings.max_characters is not None and len(text) > settings.max_characters for text in texts]
    if settings.max_tokens is None:
        return found
    if settings.tokenizer is None:
        raise ValueError("--max-tokens counts a tokenizer's tokens: give --tokenizer DIR")
    try:
        tokenizer = load_tokenizer(settings.tokenizer)
    except ValueError as error:
        raise ValueError(str(error).replace("model.tokenizer:", "--tokenizer:", 1)) from None
    short = [index for index, is_long in enumerate(found) if not is_long]
    for index, ids in zip(short, tokenizer.encode_many([texts[index] for index in short]), strict=True):
        found[index] = len(ids) > settings.max_tokens
    return found


def read_evaluation_sets(paths: Sequence[Path], ngram: int) -> ContaminationIndex:
    index = ContaminationIndex(ngram)
    for path in paths:
        for line, row in read_jsonl(path, "--decontaminate"):
            try:
                question = question_of(row)
            except ValueError as error:
                raise ValueError(
                    f"--decontaminate: {path} line {line}: {error}; give a prompts file, as this command writes them"
                ) from None
            index.add(question, f"{path.stem}: {row.get('id', f'line {line}')}")
    return index


@contextmanager
def comparing_answers() -> Iterator[SameAnswer]:
    """Yields a function that tells whether two answers are equal: spelled alike, or equal for the verifier."""
    with MathVerifier(num_workers=1) as verifier:

        def same(first: str, second: str) -> bool:
            if first == second or answer_key(first) == answer_key(second):
                return True
            return verifier.verify(f"\\boxed{{{second}}}", first).reward > 0

        yield same


def summarize(findings: Findings, settings: CleaningSettings) -> dict[str, Any]:
    """Returns the findings as JSON, with the ids of all prompts concerned."""
    is_removed = settings.duplicates != "keep"
    sets = Counter(name.rpartition(": ")[0] for _, name in findings.contaminated)
    return {
        "too_long": {"count": findings.num_too_long, "removed": True},
        "image_links": {"count": findings.num_images, "removed": settings.drop_images},
        "contaminated": {
            "count": len(findings.contaminated),
            "removed": True,
            "ngram": settings.ngram,
            "sets": dict(sets),
            "pairs": findings.contaminated,
        },
        "exact_duplicates": {"count": len(findings.exact), "removed": is_removed, "pairs": findings.exact},
        "near_duplicates": {
            "count": len(findings.near) if settings.duplicates == "near" else None,  # None: not searched
            "removed": is_removed,
            "pairs": findings.near,
        },
        "conflicting_answers": {
            "count": findings.num_conflicting,
            "removed": is_removed,
            "groups": findings.conflicts,
        },
        "similar_with_other_answers": {
            "count": len(findings.near_conflicts) if settings.duplicates == "near" else None,
            "removed": False,
            "groups": findings.near_conflicts,
        },
    }
