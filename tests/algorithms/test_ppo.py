"""PPO against values computed by hand and by plain Python loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_oreal.algorithms.ppo import Ppo, judged_sequences
from megatron_oreal.config import Correction, PpoConfig
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict

STATUS = {True: "correct", False: "incorrect"}


def sample(response: list[int], correct: bool, status: str | None = None) -> Sample:
    verdict = Verdict(float(correct), status or STATUS[correct], None)  # type: ignore[arg-type]
    zeros = [0.0] * len(response)
    return Sample("p", [1, 2], response, "", zeros, zeros, "stop", 0, verdict)


def group(*samples: Sample) -> Group:
    return Group(Prompt("p", (Message("user", "?"),), "1"), list(samples))


GROUPS = [group(sample([10, 11, 12], True), sample([13, 14], False)), group(sample([15, 16], True), sample([17], True))]
LOGPROBS = {10: -0.1, 11: -0.2, 12: -0.3, 13: -0.4, 14: -0.5, 15: -0.6, 16: -0.7, 17: -0.8}
# The value at a position is that of the token read there: the prompt's last token 2, then the response's.
VALUES = {2: 0.5, 10: 0.6, 11: 0.7, 13: 0.4, 15: 0.8}


def build(table_model: Any, microbatch_tokens: int = 100, lr: float = 0.0, **settings: Any) -> tuple[Ppo, Any, Any]:
    policy = table_model("policy", LOGPROBS, lr=lr)
    critic = table_model("critic", VALUES, scores=True, lr=lr)
    config = PpoConfig(name="ppo", **{"critic_minibatches": 1} | settings)
    reference = table_model("reference", {token: value - 0.5 for token, value in LOGPROBS.items()})
    needs_reference = config.kl_coef > 0 or config.kl_reward_coef > 0
    plan = PackingPlan(0, 1, microbatch_tokens)
    return Ppo(config, plan, 0, policy, critic, reference if needs_reference else None), policy, critic


def whitened(advantages: dict[int, float]) -> dict[int, float]:
    mean = sum(advantages.values()) / len(advantages)
    std = math.sqrt(sum((value - mean) ** 2 for value in advantages.values()) / len(advantages))
    return {token: (value - mean) / std for token, value in advantages.items()}


# With discount = lambda = 1: A = R - V, R = 1 for the tokens of a correct answer.
ADVANTAGES = {10: 0.5, 11: 0.4, 12: 0.3, 13: -0.5, 14: -0.4, 15: 0.5, 16: 0.2, 17: 0.5}
RETURNS = {10: 1.0, 11: 1.0, 12: 1.0, 13: 0.0, 14: 0.0, 15: 1.0, 16: 1.0, 17: 1.0}
# The token whose reading gives the value of predicting the token.
READ_AT = {10: 2, 11: 10, 12: 11, 13: 2, 14: 13, 15: 2, 16: 15, 17: 2}


def test_policy_gradient_is_the_whitened_advantage_over_the_number_of_tokens(table_model: Any) -> None:
    ppo, policy, _ = build(table_model)
    metrics = ppo.update(GROUPS, 0)
    expected = {token: -advantage / 8 for token, advantage in whitened(ADVANTAGES).items()}
    assert policy.gradients[0] == pytest.approx(expected, abs=1e-6)
    mean = sum(ADVANTAGES.values()) / 8
    assert metrics["train/advantage_mean"] == pytest.approx(mean, abs=1e-6)
    assert metrics["policy/loss"] == pytest.approx(-sum(whitened(ADVANTAGES).values()) / 8, abs=1e-6)


def test_metrics_are_the_means_over_all_mini_batches(table_model: Any) -> None:
    """Two mini-batches of two sequences each, whichever they are: each token weighs one over its mini-batch's count."""
    ppo, policy, _ = build(table_model, policy_minibatches=2, critic_minibatches=2, critic_epochs=2)
    metrics = ppo.update(GROUPS, 0)
    logprob_means, value_means = [], []
    for batch in [batch for batch in policy.batches if batch.num_sequences == 2]:
        labels = [int(label) for part in batch.microbatches for label in part.labels[part.trained]]
        logprob_means.append(-sum(LOGPROBS[label] for label in labels) / len(labels))
        value_means.append(sum(VALUES[READ_AT[label]] for label in labels) / len(labels))
    assert len(logprob_means) == 2 and logprob_means[0] != logprob_means[1]
    assert metrics["policy/mismatch"] == pytest.approx(sum(logprob_means) / 2)
    assert metrics["policy/mismatch_max"] == pytest.approx(0.8)
    assert metrics["critic/value_mean"] == pytest.approx(sum(value_means) / 2)


def test_learning_rates_follow_what_the_step_plans_not_what_it_takes(table_model: Any) -> None:
    ppo, policy, critic = build(
        table_model, policy_minibatches=8, policy_epochs=2, critic_minibatches=8, policy_freeze_steps=1
    )
    assert ppo.planned_updates(0) == {"critic": 8, "policy": 0}
    assert ppo.planned_updates(1) == {"critic": 8, "policy": 16}
    ppo.update(GROUPS, 1)
    assert (len(critic.gradients), len(policy.gradients)) == (4, 8)  # There are only four sequences.


def test_off_policy_tokens_are_weighed(table_model: Any) -> None:
    """The engine gave every token the log-prob 0: the ratio is the token's probability, cut at 0.7."""
    ppo, policy, _ = build(table_model)
    ppo.correction = Correction(importance_cap=0.7)
    metrics = ppo.update(GROUPS, 0)
    ratio = {token: math.exp(logprob) for token, logprob in LOGPROBS.items()}
    weights = {token: min(value, 0.7) for token, value in ratio.items()}
    expected = {token: -weights[token] * advantage / 8 for token, advantage in whitened(ADVANTAGES).items()}
    assert policy.gradients[0] == pytest.approx(expected, abs=1e-6)
    assert metrics["policy/importance_mean"] == pytest.approx(sum(weights.values()) / 8)
    assert metrics["policy/importance_max"] == pytest.approx(math.exp(-0.1))
    assert metrics["policy/importance_capped_share"] == sum(value > 0.7 for value in ratio.values()) / 8


def test_critic_gradient_is_the_error_over_the_number_of_tokens(table_model: Any) -> None:
    ppo, _, critic = build(table_model)
    metrics = ppo.update(GROUPS, 0)
    expected: dict[int, float] = {}
    for token, read in READ_AT.items():
        expected[read] = expected.get(read, 0.0) + (VALUES[read] - RETURNS[token]) / 8
    assert critic.gradients[0] == pytest.approx(expected, abs=1e-6)
    errors = sum((VALUES[READ_AT[token]] - RETURNS[token]) ** 2 for token in RETURNS)
    assert metrics["critic/loss"] == pytest.approx(errors / 16, abs=1e-6)


def test_gae_discounts_and_kl_rewards(table_model: Any) -> None:
    settings = {"discount": 0.9, "gae_lambda": 0.8, "kl_reward_coef": 0.1, "whiten_advantages": False}
    ppo, policy, _ = build(table_model, **settings)
    ppo.update([GROUPS[0]], 0)
    kl = 0.1 * 0.5  # log-prob minus the reference's is 0.5 everywhere
    values, rewards = [0.5, 0.6, 0.7], [-kl, -kl, 1.0 - kl]
    following = next_value = 0.0
    expected = {}
    for token, value, reward in zip([12, 11, 10], values[::-1], rewards[::-1], strict=True):
        following = reward + 0.9 * next_value - value + 0.9 * 0.8 * following
        expected[token], next_value = -following / 5, value
    following = next_value = 0.0
    for token, value, reward in zip([14, 13], [0.4, 0.5], [-kl, -kl], strict=True):
        following = reward + 0.9 * next_value - value + 0.9 * 0.8 * following
        expected[token], next_value = -following / 5, value
    assert policy.gradients[0] == pytest.approx(expected, abs=1e-6)


def test_second_epoch_clips_the_ratio(table_model: Any) -> None:
    """A large first step moves the ratios out of the clip range on the side that the advantage asks for."""
    ppo, policy, _ = build(table_model, lr=10.0, policy_epochs=2, clip_low=0.1, clip_high=0.3)
    metrics = ppo.update(GROUPS, 0)
    advantages, moved = whitened(ADVANTAGES), {}
    for token, advantage in advantages.items():
        ratio = math.exp(10.0 * advantage / 8)
        is_clipped = (advantage > 0 and ratio > 1.3) or (advantage < 0 and ratio < 0.9)
        if not is_clipped:
            moved[token] = -advantage * ratio / 8
    assert policy.gradients[1] == pytest.approx(moved, abs=1e-6)
    assert metrics["policy/clip_share"] > 0.5


def test_value_clipping_takes_the_larger_error(table_model: Any) -> None:
    """After a first step towards the return, the clipped value is the one further away and has no gradient."""
    ppo, _, critic = build(table_model, lr=4.0, critic_epochs=2, value_clip=0.05)
    ppo.update([group(sample([17], True))], 0)
    # One token: value 0.5, return 1; the step of 4 x 0.5 takes it to 2.5, clipped to 0.55.
    first, second = critic.gradients
    assert first == pytest.approx({2: -0.5}, abs=1e-6)
    assert second == pytest.approx({2: 1.5}, abs=1e-6)  # (2.5 - 1)^2 is larger than (0.55 - 1)^2
    ppo, _, critic = build(table_model, lr=0.4, critic_epochs=2, value_clip=0.05)
    ppo.update([group(sample([17], True))], 0)
    assert critic.gradients[1] == {}  # 0.7 is nearer to 1 than 0.55


def test_kl_and_entropy_in_the_loss(table_model: Any) -> None:
    plain, _, _ = build(table_model)
    pulled, policy, _ = build(table_model, kl_coef=0.1, kl_kind="mse", entropy_coef=0.01)
    difference = pulled.update(GROUPS, 0)["policy/loss"] - plain.update(GROUPS, 0)["policy/loss"]
    assert difference == pytest.approx(0.1 * 0.5**2 / 2 - 0.01 * 0.5, abs=1e-6)
    expected = {token: (-advantage + 0.1 * 0.5) / 8 for token, advantage in whitened(ADVANTAGES).items()}
    assert policy.gradients[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("critic_minibatches", "policy_minibatches"), [(4, 1), (4, 2), (1, 2), (12, 1)])
def test_minibatches_cover_every_sample_once(
    table_model: Any, critic_minibatches: int, policy_minibatches: int
) -> None:
    ppo, policy, critic = build(
        table_model, critic_minibatches=critic_minibatches, policy_minibatches=policy_minibatches
    )
    ppo.update(GROUPS, 0)
    for model, count in ((policy, policy_minibatches), (critic, critic_minibatches)):
        batches = model.batches[-min(count, 4) :]
        assert len(model.gradients) == min(count, 4)  # there are four samples
        assert sum(batch.num_sequences for batch in batches) == 4
        assert sum(batch.num_tokens for batch in batches) == 8


def test_micro_batches_do_not_change_the_gradients(table_model: Any) -> None:
    whole, policy, critic = build(table_model)
    whole.update(GROUPS, 0)
    cut, cut_policy, cut_critic = build(table_model, microbatch_tokens=1)
    cut.update(GROUPS, 0)
    assert cut_policy.gradients[0] == pytest.approx(policy.gradients[0], abs=1e-6)
    assert cut_critic.gradients[0] == pytest.approx(critic.gradients[0], abs=1e-6)


def test_unjudged_samples_are_left_out_and_frozen_steps_train_the_critic_only(table_model: Any) -> None:
    ppo, policy, critic = build(table_model, policy_freeze_steps=1)
    metrics = ppo.update([group(sample([17], True), sample([16], False, "timeout"))], 0)
    assert metrics["train/num_sequences"] == 1
    assert len(critic.gradients) == 1 and policy.gradients == []
    assert ppo.update([group(sample([17], False, "crash"))], 0) == {"train/skipped": 1.0}


def test_minibatch_counts_must_divide_each_other() -> None:
    with pytest.raises(ValueError, match="one must divide the other"):
        PpoConfig(name="ppo", critic_minibatches=3, policy_minibatches=2)


def test_the_order_of_samples_in_minibatches_depends_on_seed_and_step_alone(table_model: Any) -> None:
    firsts = []
    for step in (3, 3):
        ppo, _, critic = build(table_model, critic_minibatches=4)
        ppo.update(GROUPS, step)
        firsts.append([batch.microbatches[0].input_ids.tolist() for batch in critic.batches[-4:]])
    assert firsts[0] == firsts[1]
    assert torch.tensor([len(ids) for ids in firsts[0]]).sum() == 16


def test_the_reward_may_be_any_number() -> None:
    half = sample([17], False)
    half.verdict = Verdict(0.5, "incorrect", None)
    unjudged = sample([16], False, "reward_failed")
    sequences = judged_sequences(group(half, sample([18], True), unjudged), PpoConfig(name="ppo"))
    assert [sequence.advantage for sequence in sequences] == [0.5, 1.0]
