"""Repetition, reflection words, lengths and pass@n of hand-made groups."""

from __future__ import annotations

import pytest

from megatron_oreal.rollout.metrics import num_reflection_words, repetition, text_metrics
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict, VerdictStatus


def sample(status: VerdictStatus, length: int, text: str = "", stopped: bool = True) -> Sample:
    verdict = Verdict(float(status == "correct"), status, "1")
    ids = list(range(length))
    return Sample("p", [1], ids, text, [0.0] * length, [0.0] * length, "stop" if stopped else "length", 0, verdict)


def group(*samples: Sample) -> Group:
    return Group(Prompt("p", (Message("user", "?"),), "1"), list(samples))


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0),
        ([1, 2], 0),  # shorter than an n-gram
        ([1, 2, 3, 4, 5], 0),
        ([1, 2, 3, 1, 2, 3], 1 / 4),  # 123 231 312 123
        ([7] * 10, 7 / 8),
        ([0] * 4, 1 / 2),
    ],
)
def test_repetition_counts_ngrams_seen_before(tokens: list[int], expected: float) -> None:
    assert repetition(tokens, ngram_tokens=3) == pytest.approx(expected)


def test_repetition_is_the_share_of_repeated_tuples() -> None:
    tokens = [(n * n) % 23 for n in range(300)]
    ngrams = [tuple(tokens[start : start + 16]) for start in range(len(tokens) - 15)]
    assert repetition(tokens) == pytest.approx(1 - len(set(ngrams)) / len(ngrams))


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Wait, that is wrong. However, wait.", 3),
        ("The waiter awaits a retrying client.", 0),
        ("Alternatively: RECHECK and retry", 3),
        ("wait", 1),
        ("", 0),
    ],
)
def test_reflection_words_are_whole_words(text: str, count: int) -> None:
    assert num_reflection_words(text) == count


def test_the_metrics_by_hand() -> None:
    groups = [
        group(sample("correct", 10, "Wait, 1"), sample("incorrect", 30), sample("incorrect", 20), sample("correct", 4)),
        group(sample("incorrect", 40, "wait, wait", False), *[sample("timeout", 100)] * 3),
    ]
    metrics = text_metrics(groups)
    assert metrics == pytest.approx(
        {
            "rollout/num_not_stopped": 1,
            "rollout/repetition_mean": 0,
            "rollout/repetition_max": 0,
            "rollout/reflection_words_mean": 3 / 8,
            "rollout/reflection_share": 2 / 8,
            "rollout/length_correct_mean": 7,
            "rollout/length_incorrect_mean": 30,
            "rollout/length_reflection_correct_mean": 10,
            "reward/pass_at_2": 1 - 1 / 6,  # the second group has one judged sample
        }
    )


def test_lengths_of_what_there_is_none_are_left_out() -> None:
    metrics = text_metrics([group(sample("timeout", 3), sample("timeout", 3))])
    assert not [name for name in metrics if "length" in name or "pass_at" in name]
