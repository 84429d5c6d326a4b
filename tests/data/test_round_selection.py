"""Data selection, by hand."""

import pytest

from megatron_oreal.data.round_selection import AnsweredPrompt, resample_by_tags, select_responses, tag_failure_rates

ANSWERED = [
    AnsweredPrompt("easy", (("a", True), ("b", True))),
    AnsweredPrompt("half", (("c", True), ("c", True), ("d", True), ("e", False))),
    AnsweredPrompt("hard", (("f", False), ("g", False))),
]
TAGS = {"easy": ["add"], "half": ["add", "carry"], "hard": ["carry"], "new": ["carry"], "other": ["zoo"], "bare": []}


def test_correct_and_distinct_responses_are_selected() -> None:
    assert select_responses(ANSWERED[1:], 4, 1.0, 0) in ([("half", "c"), ("half", "d")], [("half", "d"), ("half", "c")])
    assert len(select_responses(ANSWERED, 1, 1.0, 0)) == 2
    assert {id_ for id_, _ in select_responses(ANSWERED, 4, 0.9, 0)} == {"half"}
    assert select_responses(ANSWERED, 1, 1.0, 7) == select_responses(ANSWERED, 1, 1.0, 7)


def test_failure_rates_are_means_over_prompts() -> None:
    assert tag_failure_rates(ANSWERED, TAGS) == pytest.approx({"add": (0.0 + 0.25) / 2, "carry": (0.25 + 1.0) / 2})
    unjudged = AnsweredPrompt(ANSWERED[0].id, ())
    assert tag_failure_rates([unjudged], TAGS) == {}


def test_prompts_with_failed_tags_are_drawn_in_proportion() -> None:
    rates = tag_failure_rates(ANSWERED, TAGS)
    counts = dict.fromkeys(TAGS, 0)
    for seed in range(2000):
        (drawn,) = resample_by_tags(rates, TAGS, 1, seed)
        counts[drawn] += 1
    weights = {"easy": 0.125, "half": 0.375, "hard": 0.625, "new": 0.625}
    assert counts["other"] == counts["bare"] == 0
    for id_, weight in weights.items():
        assert counts[id_] / 2000 == pytest.approx(weight / sum(weights.values()), abs=0.04)
    assert set(resample_by_tags(rates, TAGS, 4, 0)) == set(weights)
    with pytest.raises(ValueError, match="--count must be <= 4"):
        resample_by_tags(rates, TAGS, 5, 0)
