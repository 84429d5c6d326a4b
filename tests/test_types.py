"""Dataclasses that hold token arrays: dtypes, equality, copies."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.engines.engine import Generation, GenerationRequest
from megatron_oreal.types import Group, Message, Prompt, Sample, TokenData, TrainingSequence, Verdict

PROMPT = Prompt("p", (Message("user", "?"),), "1")


def make_sample(**fields: object) -> Sample:
    known: dict[str, object] = {
        "prompt_id": "p",
        "prompt_ids": [1],
        "response_ids": [5, 6],
        "response_text": "5",
        "rollout_logprobs": [-0.1, -0.2],
        "model_logprobs": [-0.3, -0.4],
        "finish_reason": "stop",
        "policy_version": 3,
        "verdict": Verdict(1.0, "correct", "1"),
        "policy_versions": [3, 4],
    }
    return Sample(**known | fields)  # type: ignore[arg-type]


def test_lists_become_arrays_of_the_annotated_dtype() -> None:
    sample = make_sample()
    ids = (sample.prompt_ids, sample.response_ids, sample.policy_versions)
    assert {array.dtype for array in ids} == {np.dtype(np.int32)}
    assert {sample.rollout_logprobs.dtype, sample.model_logprobs.dtype} == {np.dtype(np.float32)}
    assert sample.rollout_logprobs.tolist() == [np.float32(-0.1), np.float32(-0.2)]
    assert Generation(np.arange(3), [], np.zeros(3), "stop").response_ids.dtype == np.int32
    assert GenerationRequest([], 0).prompt_ids.dtype == np.int32  # also where there is nothing


def test_an_array_of_the_right_dtype_is_kept_without_a_copy() -> None:
    ids, logprobs = np.array([5, 6], np.int32), np.array([-0.5, -1.0], np.float32)
    generation = Generation(ids, logprobs, logprobs, "stop")
    assert generation.response_ids is ids and generation.model_logprobs is generation.rollout_logprobs is logprobs
    assert TrainingSequence(ids, generation.response_ids, 1.0, True).prompt_ids is ids


def test_what_is_not_known_is_an_empty_array_of_its_own() -> None:
    one, other = TrainingSequence([1], [2], 1.0, True), TrainingSequence([1], [2], 1.0, True)
    assert one.model_logprobs.shape == (0,) and one.model_logprobs is not other.model_logprobs
    assert make_sample(policy_versions=[]).policy_versions.shape == (0,)


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt_ids": [2]},
        {"response_ids": [5, 7]},
        {"response_ids": [5]},
        {"response_ids": []},
        {"rollout_logprobs": []},
        {"model_logprobs": [-0.3, -0.40001]},
        {"policy_versions": []},
        {"policy_version": 4},
        {"finish_reason": "length"},
        {"verdict": None},
    ],
    ids=str,
)
def test_samples_are_equal_where_all_their_values_are(changed: dict[str, object]) -> None:
    assert make_sample() == make_sample()
    assert make_sample(**changed) != make_sample()
    assert Group(PROMPT, [make_sample()]) == Group(PROMPT, [make_sample()])
    assert Group(PROMPT, [make_sample(**changed)]) != Group(PROMPT, [make_sample()])


def test_only_instances_of_one_class_are_equal() -> None:
    assert GenerationRequest([1], 0) != EncodedPrompt(PROMPT, [1]) and make_sample() != "p"
    assert GenerationRequest([1], 0, Generation([2], [], [], "abort")) == GenerationRequest(
        [1], 0, Generation([2], [], [], "abort")
    )
    assert GenerationRequest([1], 0, Generation([2], [], [], "abort")) != GenerationRequest([1], 0)


@pytest.mark.parametrize(
    "value", [make_sample(), Generation([1], [-0.5], [-0.5], "stop", [3]), GenerationRequest([1], 2)], ids=repr
)
def test_copies_are_equal_to_what_was_copied(value: TokenData) -> None:
    assert pickle.loads(pickle.dumps(value)) == value
    assert copy.deepcopy(value) == value and replace(value) == value  # type: ignore[type-var]


def test_arrays_are_not_keys() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(make_sample())
