"""Finds training questions that share a run of words with a question of an evaluation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_oreal.data.question_text import words

MIN_CONTAINED = 8  # words; a shorter evaluation question contaminates only a question that equals it


class ContaminationIndex:
    """Indexes every run of `ngram` words of the evaluation questions; a shorter question is indexed as a whole.

    Example: with ngram=13, a training question that holds 13 successive words of an evaluation question is
    contaminated, and so is one that holds all 9 words of a shorter one.
    """

    def __init__(self, ngram: int) -> None:
        self.ngram = ngram
        self.runs: dict[str, str] = {}  # a run of words -> the first evaluation question that holds it
        self.whole: dict[str, str] = {}  # a short question -> itself
        self.lengths: set[int] = set()  # of runs

    def add(self, question: str, name: str) -> None:
        text = words(question)
        if not text:
            return
        if len(text) >= self.ngram:
            length = self.ngram
        elif len(text) >= MIN_CONTAINED:
            length = len(text)
        else:
            self.whole.setdefault(" ".join(text), name)
            return
        self.lengths.add(length)
        for run in runs(text, length):
            self.runs.setdefault(run, name)

    def find(self, question: str) -> str | None:
        """Returns the name of an evaluation question that shares a run of words with this question, or None."""
        text = words(question)
        whole = self.whole.get(" ".join(text))
        if whole is not None:
            return whole
        for length in sorted(self.lengths, reverse=True):
            for run in runs(text, length):
                if run in self.runs:
                    return self.runs[run]
        return None


def runs(text: Sequence[str], length: int) -> Iterator[str]:
    return (" ".join(text[start : start + length]) for start in range(len(text) - length + 1))
