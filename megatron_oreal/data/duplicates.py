"""Finds questions that occur several times: exactly, nearly, and with different answers.

Two questions are exact duplicates if they differ only in spaces and in the look of formulas. They are near duplicates
if they have the same numbers in the same order, equal answers, and a large share of common sequences of three words
(Jaccard similarity): in mathematics, another number makes another question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_oreal.data.question_text import numbers, same_text_key, words

SHINGLE = 3  # words that follow each other
PERMUTATIONS = 128  # of a MinHash
INSTALL = "pip install datasketch"

SameAnswer = Callable[[str, str], bool]


@dataclass(slots=True, frozen=True)
class Question:
    id: str
    text: str
    answer: str


@dataclass(slots=True)
class Duplicates:
    """The duplicates and conflicts that were found, as indices into the questions."""

    exact: list[tuple[int, int]] = field(default_factory=list)  # (the later one, the first one)
    near: list[tuple[int, int]] = field(default_factory=list)
    # Each group has one question with different answers; no member of a group is in `exact`.
    conflicts: list[list[int]] = field(default_factory=list)
    near_conflicts: list[tuple[int, int]] = field(default_factory=list)  # alike, with answers that differ


def find_exact(questions: Sequence[Question], same_answer: SameAnswer) -> Duplicates:
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(same_text_key(question.text), []).append(index)
    found = Duplicates()
    for group in groups.values():
        first, *later = group
        if all(same_answer(questions[first].answer, questions[index].answer) for index in later):
            found.exact += [(index, first) for index in later]
        else:
            found.conflicts.append(group)
    return found


def find_near(
    questions: Sequence[Question], candidates: Sequence[int], threshold: float, same: SameAnswer
) -> Duplicates:
    """Compares the candidates, which are no exact duplicates; pairs each with a similar candidate that is kept."""
    found = Duplicates()
    blocks: dict[tuple[str, ...], list[int]] = {}
    shingles: dict[int, frozenset[str]] = {}
    for index in candidates:
        text = words(questions[index].text)
        if not text:  # The question has only punctuation.
            continue
        blocks.setdefault(numbers(text), []).append(index)
        shingles[index] = shingle_set(text)
    for block in blocks.values():
        if len(block) > 1:
            for later, first in similar_pairs(block, shingles, threshold):
                agree = same(questions[first].answer, questions[later].answer)
                (found.near if agree else found.near_conflicts).append((later, first))
    removed: set[int] = set()
    kept_pairs = []
    for later, first in sorted(found.near):  # in this order, so that one of a chain of three stays
        if first not in removed and later not in removed:
            removed.add(later)
            kept_pairs.append((later, first))
    found.near = kept_pairs
    found.near_conflicts = sorted(pair for pair in found.near_conflicts if not removed & set(pair))
    return found


def shingle_set(text: Sequence[str]) -> frozenset[str]:
    if len(text) < SHINGLE:
        return frozenset([" ".join(text)])
    return frozenset(" ".join(text[start : start + SHINGLE]) for start in range(len(text) - SHINGLE + 1))


def similar_pairs(
    block: Sequence[int], shingles: dict[int, frozenset[str]], threshold: float
) -> Iterator[tuple[int, int]]:
    """Yields (later, earlier) pairs whose similarity is at least `threshold`.

    In small blocks it compares all pairs; in larger blocks MinHash proposes the pairs and misses few of them.
    """
    pairs: Iterator[tuple[int, int]]
    if len(block) <= PERMUTATIONS:
        pairs = ((later, first) for number, later in enumerate(block) for first in block[:number])
    else:
        pairs = proposed_pairs(block, shingles, threshold)
    for later, first in pairs:
        if jaccard(shingles[later], shingles[first]) >= threshold:
            yield later, first


def proposed_pairs(
    block: Sequence[int], shingles: dict[int, frozenset[str]], threshold: float
) -> Iterator[tuple[int, int]]:
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ValueError(f"--duplicates near needs a package: {INSTALL}; or choose --duplicates exact") from None
    # MinHash gets a lower threshold, so that it misses few pairs at the real one; the exact similarity decides.
    index = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS)
    for later in block:
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode() for shingle in shingles[later]])
        yield from ((later, first) for first in sorted(index.query(sketch)))
        index.insert(later, sketch)


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)
