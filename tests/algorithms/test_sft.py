from typing import Any

import pytest

from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.types import TrainingSequence

SEQUENCES = [
    TrainingSequence([1, 2], [10, 11], 0.0, True),
    TrainingSequence([3], [12], 0.0, True),
    TrainingSequence([4, 5], [13, 10], 0.0, True),
]
LOGPROBS = {10: -1.0, 11: -2.0, 12: -0.5, 13: -3.0}
LOSS = (1.0 + 2.0 + 0.5 + 3.0 + 1.0) / 5
GRADIENT = {10: -0.4, 11: -0.2, 12: -0.2, 13: -0.2}  # 10 is there twice


@pytest.mark.parametrize("microbatch_tokens", [100, 4, 1])
def test_the_mean_over_all_response_tokens(table_model: Any, microbatch_tokens: int) -> None:
    policy = table_model("policy", LOGPROBS)
    metrics = Sft(PackingPlan(0, 1, microbatch_tokens), policy).update(SEQUENCES, 0)
    assert metrics == {
        "train/num_sequences": 3,
        "train/num_tokens": 5,
        "policy/loss": pytest.approx(LOSS),
        "policy/entropy": pytest.approx(0.5),
    }
    assert policy.gradients == [pytest.approx(GRADIENT)]


def test_data_parallel_ranks_add_up(table_model: Any) -> None:
    loss, gradient = 0.0, dict.fromkeys(GRADIENT, 0.0)
    for rank in range(4):  # one of them has nothing but filler
        policy = table_model("policy", LOGPROBS)
        loss += Sft(PackingPlan(rank, 4, microbatch_tokens=100), policy).update(SEQUENCES, 0)["policy/loss"]
        for token, value in policy.gradients[0].items():
            gradient[token] += value
    assert loss == pytest.approx(LOSS)
    assert gradient == pytest.approx(GRADIENT)


def test_several_updates_a_step(table_model: Any) -> None:
    policy = table_model("policy", LOGPROBS, lr=0.5)
    metrics = Sft(PackingPlan(0, 1, microbatch_tokens=100), policy, policy_updates=3).update(SEQUENCES, 0)
    assert len(policy.gradients) == 3
    # Each update raises 10 by 0.2 and the others by 0.1: the last one sees the effect of two.
    assert metrics["policy/loss"] == pytest.approx(LOSS - 2 * (2 * 0.2 + 3 * 0.1) / 5)
    assert policy.table[10].item() == pytest.approx(-1.0 + 3 * 0.2)
