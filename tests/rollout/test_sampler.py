"""Metrics and records of samples, also of engines that know less."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.metrics import logprob_sum, nearest_rank, rollout_metrics, staleness_metrics
from megatron_oreal.rollout.records import write_rollouts
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict
from tests.support.memory_engine import PARAMS, MemoryEngine, make_prompts, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_sample(length: int, version: int = 0, logprob: float | None = -0.5) -> Sample:
    known = [] if logprob is None else [logprob] * length
    return Sample("p", [1], [5] * length, "", known, [-0.5] * length, "stop", version, Verdict(1.0, "correct", "1"), [])


def make_group(*samples: Sample) -> Group:
    return Group(Prompt("p", (Message("user", "?"),), "1"), list(samples))


def test_lengths_and_known_log_probs_by_hand() -> None:
    group = make_group(*(make_sample(length) for length in (1, 2, 3, 10)), make_sample(4, logprob=None))
    metrics = rollout_metrics([group])
    assert metrics["rollout/length_mean"] == 4
    assert metrics["rollout/length_median"] == 3
    assert metrics["rollout/length_nine_tenths"] == metrics["rollout/length_max"] == 10
    assert metrics["rollout/logprob_mean"] == -0.5  # a token, of those that are known
    assert "rollout/logprob_mean" not in rollout_metrics([make_group(make_sample(4, logprob=None))])


def test_log_probs_are_summed_in_double_precision_from_the_first_token_on() -> None:
    logprobs = (-np.random.default_rng(0).exponential(size=1000)).astype(np.float32)
    sample = make_sample(1000)
    sample.rollout_logprobs = logprobs
    total = 0.0
    for value in logprobs.tolist():
        total += value
    assert logprob_sum(sample) == total
    sample.rollout_logprobs = np.array([-0.0, -0.0], np.float32)
    assert str(logprob_sum(sample)) == "0.0"


def test_nearest_rank_by_hand() -> None:
    values = [30, 10, 20, 40]
    assert [nearest_rank(values, share) for share in (0.0, 0.25, 0.5, 0.51, 0.9, 1.0)] == [10, 10, 20, 30, 40, 40]


def test_staleness_by_hand() -> None:
    groups = [make_group(make_sample(1, version=5), make_sample(1, version=3)), make_group(make_sample(1, version=4))]
    assert staleness_metrics(groups, 5) == {"rollout/staleness_mean": 1.0, "rollout/staleness_max": 2}
    assert staleness_metrics([], 5) == {"rollout/staleness_mean": 0.0, "rollout/staleness_max": 0}


def test_a_record_says_what_is_not_known(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "step.jsonl", [make_group(make_sample(2), make_sample(2, logprob=None))])
    rows = [json.loads(line) for line in (tmp_path / "step.jsonl").read_text().splitlines()]
    assert [row["logprob"] for row in rows] == [-1.0, None]


def test_the_samples_of_a_prompt_differ_and_an_equal_call_gives_equal_groups(tokenizer: Tokenizer) -> None:
    results = []
    for _ in range(2):
        with MathVerifier() as verifier:
            sampler = Sampler(MemoryEngine(), tokenizer, verifier, is_main=True, require_stop=True)
            results.append(sampler.sample(make_prompts(5), 3, PARAMS, "seed"))
    assert results[0] == results[1]
    responses = [sample.response_ids for sample in results[0][0].samples]
    assert len({tuple(ids) for ids in responses}) == 3


def test_what_follows_a_stop_string_is_cut_from_every_list(tokenizer: Tokenizer) -> None:
    engine, ticks = MemoryEngine(), iter(range(100))
    engine.knows_rollout_logprobs = True
    engine.tick = lambda: setattr(engine, "version", int(next(ticks) >= 2))
    sampler = Sampler(engine, tokenizer, MathVerifier(), is_main=True, require_stop=True, stop_strings=("}",))
    for sample in (s for group in sampler.sample(make_prompts(4), 4, PARAMS, "seed") for s in group.samples):
        assert sample.response_text.endswith("}") and sample.finish_reason == "stop"
        assert len(sample.response_ids) == len(sample.model_logprobs) == len(sample.policy_versions)
        assert sample.rollout_logprobs.tolist() == (sample.model_logprobs / 2).tolist()
