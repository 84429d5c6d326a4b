"""A step of OREAL against numbers worked out by hand, and each of its choices against loops in plain Python."""

import random
from collections import Counter
from collections.abc import Sequence
from math import exp, log
from typing import Any

import pytest
import torch

from megatron_oreal.algorithms.oreal import Oreal, select_sequences
from megatron_oreal.config import Correction, OrealConfig
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict, VerdictStatus

PLAN = PackingPlan(0, 1, microbatch_tokens=1000)
LN3, LN7 = log(3), log(7)


def make_sample(prompt: list[int], response: list[int], status: VerdictStatus | None) -> Sample:
    verdict = None if status is None else Verdict(float(status == "correct"), status, None)
    return Sample("", prompt, response, "", [], [-0.5] * len(response), "stop", 0, verdict)


def make_group(prompt: list[int], *samples: tuple[list[int], VerdictStatus | None]) -> Group:
    return Group(
        Prompt("", (Message("user", ""),), ""), [make_sample(prompt, response, status) for response, status in samples]
    )


def make_config(**settings: Any) -> OrealConfig:
    return OrealConfig(**({"policy_freeze_steps": 0} | settings))


# Samples of a kind are alike where there are several: whichever is picked, the numbers are the same.
RARE = make_group([1], ([10, 11], "correct"), *[([20, 21, 22], "incorrect")] * 3)  # pass rate 1/4
FREQUENT = make_group([2, 3], *[([30, 31, 32], "correct")] * 3, ([40], "no_answer"))  # pass rate 3/4
GROUPS = [RARE, FREQUENT]
LOGPROBS = {10: -1.0, 11: -2.0, 20: -1.0, 21: -1.0, 22: -0.5, 30: -0.5, 31: -3.0, 32: -1.0, 40: -2.0}
REFERENCE = LOGPROBS | {10: -1.0 + log(2), 21: -1.0 - log(2)}
# Prefix means from the last prompt token on: [ln 3, ln 7], [ln 3, -ln 3, -ln 7], [-ln 3, ln 3, -ln 3], [-ln 3].
SCORES = {
    1: LN3,
    10: 2 * LN7 - LN3,
    20: -3 * LN3,
    21: 2 * LN3 - 3 * LN7,
    2: 100.0,
    3: -LN3,
    30: 3 * LN3,
    31: -5 * LN3,
    11: 100.0,
    22: 100.0,
    32: 100.0,
    40: 100.0,
}


def test_the_reference_preset_by_hand(table_model: Any) -> None:
    policy = table_model("policy", LOGPROBS)
    reward_model = table_model("reward_model", SCORES, scores=True)
    oreal = Oreal(make_config(), PLAN, 0, policy, table_model("reference", REFERENCE), reward_model)
    metrics = oreal.update(GROUPS, 0)
    # Advantages of +-1: 2 and -2/3 in RARE, 2/3 and -2 in FREQUENT.
    # Weights: [1/2, 3/4] and [0, 1/2, 3/4], [0, 1/2, 0] and [1/2].
    positive = (2 * (0.5 * 1 + 0.75 * 2) + 2 / 3 * 0.5 * 3) / 5
    negative = 0.5 * (2 / 3 * (0.5 + 0.75) + 2 * 0.5) / 4
    divergence = ((1 - log(2)) + (log(2) - 0.5)) / 9  # k3 of ln 2 and of -ln 2
    expected = {
        "train/skipped": 0,
        "train/num_sequences": 4,
        "train/num_tokens": 9,
        "reward_model/loss": (log(8 / 7) + log(8 / 7) + log(4) + log(4 / 3)) / 4,
        "reward_model/accuracy": 0.75,
        "reward_model/score_correct": (2 * LN7 - 3 * LN3) / 5,
        "reward_model/score_incorrect": (-3 * LN7 - LN3) / 4,
        "policy/loss": positive + negative + 0.01 * divergence,
        "policy/loss_positive": positive,
        "policy/loss_negative": negative,
        "policy/kl": divergence,
        "policy/entropy": 0.5,
        "policy/mismatch": (0.5 + 1.5 + 0.5 + 0.5 + 0 + 0 + 2.5 + 0.5 + 1.5) / 9,
        "policy/mismatch_max": 2.5,
        "policy/mismatch_ratio": (4 * exp(0.5) + 2 * exp(1.5) + 2 + exp(2.5)) / 9,
        "policy/mismatch_kl_k1": (0.5 + 1.5 + 0.5 + 0.5 + 0 + 0 + 2.5 + 0.5 + 1.5) / 9,
        "policy/mismatch_kl_k3": (4 * (exp(-0.5) - 0.5) + 2 * (exp(-1.5) + 0.5) + exp(-2.5) + 1.5) / 9,
        "policy/weight_positive": (0.5 + 0.75 + 0.5) / 5,
        "policy/weight_negative": (0.5 + 0.75 + 0.5) / 4,
        "policy/weight_zero_share": 3 / 9,
        "policy/weight_max": 0.75,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)
    kl = 0.01 / 9
    (gradient,) = policy.gradients
    expected_gradient = {10: -2 * 0.5 / 5 - kl, 11: -2 * 0.75 / 5, 31: -2 / 3 * 0.5 / 5}
    expected_gradient |= {21: 0.5 * 2 / 3 * 0.5 / 4 + 0.5 * kl, 22: 0.5 * 2 / 3 * 0.75 / 4, 40: 0.5 * 2 * 0.5 / 4}
    assert gradient == pytest.approx(expected_gradient, rel=1e-6)
    # (sigmoid of the mean - label) / length / 4; only the last prompt token and the response but its end count.
    (gradient,) = reward_model.gradients
    first, second, third, fourth = -1 / 8 / 2 / 4, 1 / 8 / 3 / 4, -3 / 4 / 3 / 4, 1 / 4 / 4
    assert third + fourth == 0  # both groups' share of token 3, the end of FREQUENT's prompt
    expected_gradient = {1: first + second, 10: first, 20: second, 21: second, 30: third, 31: third}
    assert gradient == pytest.approx(expected_gradient, rel=1e-6)


def test_the_paper_preset_by_hand(table_model: Any) -> None:
    policy = table_model("policy", LOGPROBS)
    unread = float("nan")  # a prompt token's score speaks about nothing in the paper's alignment
    scores = {1: unread, 2: unread, 3: unread, 10: LN3, 11: -1.0, 20: -LN3, 21: LN3, 22: -LN7}
    reward_model = table_model("reward_model", scores | {30: LN7, 31: LN3, 32: -5.0, 40: -LN3}, scores=True)
    oreal = Oreal(OrealConfig(preset="paper"), PLAN, 0, policy, table_model("reference", REFERENCE), reward_model)
    metrics = oreal.update(GROUPS, 0)
    # w+ = [1/2, 0] and [3/4, 1/2, 0]; w- = [1/2, 0, 3/4] times 1 - 1/4, and [1/2] times 1 - 3/4.
    assert metrics["policy/loss_positive"] == pytest.approx((0.5 * 1 + 0.75 * 0.5 + 0.5 * 3) / 5)
    assert metrics["policy/loss_negative"] == pytest.approx(0.5 * (0.75 * 1.25 + 0.25 * 0.5) / 4)
    initial = {token: REFERENCE[token] - LOGPROBS[token] for token in LOGPROBS}
    assert metrics["policy/kl"] == pytest.approx(sum(exp(d) - d - 1 for d in initial.values()) / 9)
    means = [(LN3 - 1) / 2, LN7 / 3, (LN7 + LN3 - 5) / 3, LN3]  # towards the outcome where positive
    losses = [log(1 + exp(-means[0])), log(1 + exp(-means[1])), log(1 + exp(-means[2])), log(4 / 3)]
    assert metrics["reward_model/loss"] == pytest.approx(sum(losses) / 4)
    (gradient,) = policy.gradients
    expected = {10: -0.5 / 5, 30: -0.75 / 5, 31: -0.5 / 5}
    expected |= {20: 0.5 * 0.75 * 0.5 / 4, 22: 0.5 * 0.75 * 0.75 / 4, 40: 0.5 * 0.25 * 0.5 / 4}
    pulled = {10: expected[10] - 0.01 / 9, 21: 0.01 * 0.5 / 9}  # d = ln 2 and -ln 2: 1 - exp(d) is -1 and 1/2
    assert gradient == pytest.approx(expected | pulled)
    assert set(reward_model.gradients[0]) == {10, 11, 20, 21, 22, 30, 31, 32, 40}


def test_off_policy_tokens_are_weighed(table_model: Any) -> None:
    """Ratios to the engine's -0.5 are exp(logprob + 0.5), cut at 0.5: nothing but the KL stays as it was."""
    tables = table_model("reference", REFERENCE), table_model("reward_model", SCORES, scores=True)
    policy = table_model("policy", LOGPROBS)
    metrics = Oreal(make_config(), PLAN, 0, policy, *tables, correction=Correction(importance_cap=0.5)).update(
        GROUPS, 0
    )
    ratio = {token: min(exp(logprob + 0.5), 0.5) for token, logprob in LOGPROBS.items()}
    (gradient,) = policy.gradients
    kl = 0.01 / 9
    expected = {10: -2 * 0.5 / 5 * ratio[10] - kl, 11: -2 * 0.75 / 5 * ratio[11], 31: -2 / 3 * 0.5 / 5 * ratio[31]}
    expected |= {21: 0.5 * 2 / 3 * 0.5 / 4 * ratio[21] + 0.5 * kl, 22: 0.5 * 2 / 3 * 0.75 / 4 * ratio[22]}
    assert gradient == pytest.approx(expected | {40: 0.5 * 2 * 0.5 / 4 * ratio[40]}, rel=1e-6)
    # -1.0 -> exp(-1/2) four times, -0.5 -> 1 twice: these are cut.
    assert metrics["policy/importance_capped_share"] == pytest.approx(6 / 9)
    assert metrics["policy/importance_max"] == pytest.approx(1.0)


def by_definition(
    groups: Sequence[Group],
    chosen: Sequence[Sample],
    tables: tuple[dict[int, float], dict[int, float], dict[int, float]],  # log-probs, the reference's, scores
    config: OrealConfig,
) -> tuple[float, dict[int, float]]:
    """(loss, its gradient by the log-prob of each token), token by token; every token occurs once."""
    logprobs, reference, scores = tables
    counts = {kind: sum(len(s.response_ids) for s in chosen if s.is_correct is kind) for kind in (True, False)}
    num_tokens = sum(counts.values())
    if config.denominators == "sequences":
        counts, num_tokens = dict.fromkeys(counts, len(chosen)), len(chosen)
    loss, gradient = 0.0, Counter[int]()
    for group in groups:
        low = -1.0 if config.rewards == "plus_minus_one" else 0.0
        rewards = [1.0 if sample.is_correct else low for sample in group.samples]
        mean, pass_rate = sum(rewards) / len(rewards), sum(reward == 1 for reward in rewards) / len(rewards)
        deviation = (sum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)) ** 0.5
        for sample, reward in zip(group.samples, rewards, strict=True):
            if not any(sample is other for other in chosen):
                continue
            others = (sum(rewards) - reward) / (len(rewards) - 1)
            advantage = reward - others if config.advantage == "leave_one_out" else (reward - mean) / deviation
            kind = config.positive_weight if sample.is_correct else config.negative_weight
            scale = {"advantage": abs(advantage), "one": 1.0, "one_minus_pass_rate": 1 - pass_rate}[kind]
            scale *= (1.0 if sample.is_correct else config.negative_coef) / counts[sample.is_correct]
            weights = weights_by_definition(sample, scores, config)
            for token, weight in zip(sample.response_ids, weights, strict=True):
                loss += scale * weight * (-logprobs[token] if sample.is_correct else 1.0)
                gradient[token] += scale * weight * (-1 if sample.is_correct else 1)  # type: ignore[assignment]
                if config.kl_target == "initial":
                    d, coef = reference[token] - logprobs[token], config.kl_coef / num_tokens
                    is_k3 = config.kl_kind == "k3"
                    loss += coef * (exp(d) - d - 1 if is_k3 else d * d / 2)
                    gradient[token] += coef * (1 - exp(d) if is_k3 else -d)  # type: ignore[assignment]
    return loss, {token: float(value) for token, value in gradient.items()}


def weights_by_definition(sample: Sample, scores: dict[int, float], config: OrealConfig) -> list[float]:
    tokens, length = [*sample.prompt_ids, *sample.response_ids], len(sample.response_ids)
    start = len(sample.prompt_ids) - (config.score_position == "before")
    own = [scores[token] for token in tokens[start : start + length]]
    if config.prefix_mean:
        own = [sum(own[: place + 1]) / (place + 1) for place in range(length)]
    likely = [1 / (1 + exp(-score if sample.is_correct else score)) for score in own]
    if config.token_weights == "top_k":
        kept = sorted(likely, reverse=True)[: max(1, int(config.top_k_ratio * length))]
        spread = (max(kept) - min(kept)) or None
        return [0.0 if p not in kept else (p - min(kept)) / spread if spread else 1.0 for p in likely]
    weights = [max(2 * p - 1, 0.0) for p in likely]
    if config.token_weights == "threshold":
        return weights
    return [weight * length / sum(weights) for weight in weights] if sum(weights) else [1.0] * length


def random_groups() -> tuple[list[Group], tuple[dict[int, float], dict[int, float], dict[int, float]]]:
    rng = random.Random(7)
    tokens = iter(range(1, 64))
    groups = []
    for num_correct, num_samples in ((2, 5), (1, 4)):
        prompt = [next(tokens), next(tokens)]
        outcomes: list[VerdictStatus] = ["correct"] * num_correct + ["incorrect"] * (num_samples - num_correct)
        groups.append(make_group(prompt, *(([next(tokens) for _ in range(rng.randint(3, 7))], o) for o in outcomes)))
    logprobs = {token: -rng.expovariate(1.0) for token in range(1, 64)}
    reference = {token: value + rng.gauss(0, 0.5) for token, value in logprobs.items()}
    return groups, (logprobs, reference, {token: rng.gauss(0, 1) for token in range(64)})


CHOICES: list[dict[str, Any]] = [
    {},
    {"rewards": "zero_one"},
    {"advantage": "grpo"},
    {"advantage": "grpo", "rewards": "zero_one"},
    {"selection": "all"},
    {"positive_weight": "one"},
    {"negative_weight": "one_minus_pass_rate"},
    {"negative_weight": "one"},
    {"prefix_mean": False},
    {"score_position": "at"},
    {"token_weights": "top_k"},
    {"token_weights": "top_k", "top_k_ratio": 0.7},
    {"token_weights": "mean_one"},
    {"negative_coef": 2.0},
    {"negative_coef": 0.0},
    {"kl_kind": "mse"},
    {"kl_target": "old"},
    {"kl_coef": 0.0},
    {"kl_coef": 1.0},
    {"kl_coef": 1.0, "kl_kind": "mse", "selection": "all"},
    {"preset": "paper"},
    {"preset": "paper", "selection": "all"},
    {"preset": "paper", "denominators": "sequences"},
    {"denominators": "sequences", "kl_coef": 1.0},
    {"denominators": "sequences", "selection": "all", "negative_coef": 2.0},
    {"preset": "paper", "kl_target": "old"},
    {"preset": "paper", "kl_target": "initial", "kl_coef": 1.0},
    {"preset": "paper", "prefix_mean": True},
    {"preset": "paper", "score_position": "before"},
    {"preset": "paper", "token_weights": "mean_one"},
    {"preset": "paper", "positive_weight": "advantage", "negative_weight": "advantage"},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: ",".join(f"{k}={v}" for k, v in choice.items()) or "-")
def test_each_choice(table_model: Any, choice: dict[str, Any]) -> None:
    config = make_config(**choice)
    groups, tables = random_groups()
    policy, reference = table_model("policy", tables[0]), table_model("reference", tables[1])
    reward_model = table_model("reward_model", tables[2], scores=True)
    metrics = Oreal(config, PLAN, 0, policy, reference, reward_model).update(groups, 3)
    trained = set(policy.batches[0].microbatches[0].input_ids.tolist())
    samples = [sample for group in groups for sample in group.samples]
    chosen = [sample for sample in samples if set(sample.response_ids) <= trained]
    if config.selection == "all":
        assert len(chosen) == len(samples)
    else:
        for group in groups:
            kinds = [s.is_correct for s in group.samples if any(s is other for other in chosen)]
            assert sorted(kinds) == [False, True]
    loss, gradient = by_definition(groups, chosen, tables, config)
    assert metrics["policy/loss"] == pytest.approx(loss, rel=1e-5)
    for token in range(64):
        found = policy.gradients[0].get(token, 0.0)
        assert found == pytest.approx(gradient.get(token, 0.0), rel=1e-5, abs=1e-7), token


@pytest.mark.parametrize("token_weights", ["threshold", "top_k", "mean_one"])
@pytest.mark.parametrize(("num_ranks", "microbatch_tokens"), [(1, 1), (2, 1000), (2, 1), (5, 1000)])
def test_microbatches_and_ranks_change_nothing(
    table_model: Any, token_weights: str, num_ranks: int, microbatch_tokens: int
) -> None:
    """All in one micro-batch, one sequence in each, and ranks that have only filler: the same loss and gradients."""
    groups, tables = random_groups()

    def run(plan: PackingPlan) -> tuple[dict[str, float], list[dict[int, float]], int]:
        policy, reference = table_model("policy", tables[0]), table_model("reference", tables[1])
        reward_model = table_model("reward_model", tables[2], scores=True)
        config = make_config(token_weights=token_weights)
        metrics = Oreal(config, plan, 0, policy, reference, reward_model).update(groups, 0)
        return metrics, policy.gradients + reward_model.gradients, len(policy.batches[0].microbatches)

    expected, expected_gradients, count = run(PLAN)
    assert count == 1
    ranks = [run(PackingPlan(rank, num_ranks, microbatch_tokens)) for rank in range(num_ranks)]
    assert [count for _, _, count in ranks] == [4 // num_ranks if microbatch_tokens == 1 else 1] * num_ranks
    for name, value in expected.items():
        combine = max if name.startswith("train/") or name.endswith("_max") else sum
        assert combine(metrics[name] for metrics, _, _ in ranks) == pytest.approx(value, rel=1e-5), name
    for index, gradient in enumerate(expected_gradients):
        total = {token: sum(gradients[index].get(token, 0.0) for _, gradients, _ in ranks) for token in range(64)}
        assert total == pytest.approx(dict.fromkeys(range(64), 0.0) | gradient, rel=1e-5, abs=1e-8)


def test_the_policy_is_frozen_while_the_reward_model_learns(table_model: Any) -> None:
    policy = table_model("policy", LOGPROBS, lr=1.0)
    reward_model = table_model("reward_model", {}, scores=True, lr=1.0)
    oreal = Oreal(
        make_config(policy_freeze_steps=2), PLAN, 0, policy, table_model("reference", REFERENCE), reward_model
    )
    first = oreal.update(GROUPS, 0)
    second = oreal.update(GROUPS, 1)
    assert policy.gradients == [] and policy.table[10].item() == -1.0
    assert first["reward_model/loss"] == pytest.approx(log(2)) and second["reward_model/loss"] < log(2)
    assert first["policy/weight_max"] == 0 and first["policy/weight_zero_share"] == 1  # a zero head weighs nothing
    assert second["policy/weight_max"] > 0
    third = oreal.update(GROUPS, 2)
    assert len(policy.gradients) == 1 and policy.table[10].item() > -1.0
    assert set(first) == set(second) == set(third)


@pytest.mark.parametrize(("advances", "num_scheduled"), [(True, 6), (False, 2)])
def test_the_policys_learning_rate_moves_on_while_it_is_frozen(
    table_model: Any, advances: bool, num_scheduled: int
) -> None:
    """Two frozen steps and one other, of two updates each; the reward model is never frozen."""
    policy, reward_model = table_model("policy", LOGPROBS), table_model("reward_model", SCORES, scores=True)
    config = make_config(policy_freeze_steps=2, freeze_advances_schedule=advances, kl_coef=0.0)
    oreal = Oreal(config, PLAN, 0, policy, None, reward_model, policy_updates=2)
    for step in range(3):
        oreal.update(GROUPS, step)
    planned = [oreal.planned_updates(step) for step in range(3)]
    assert sum(each["policy"] for each in planned) == num_scheduled
    assert (len(policy.gradients), sum(each["reward_model"] for each in planned)) == (2, 3)


def test_eq_11_is_a_mean_over_sequences_of_sums_over_tokens(table_model: Any) -> None:
    """Weights are 1 without a reward model: each term is divided by the four sequences."""
    policy, reference = table_model("policy", LOGPROBS), table_model("reference", REFERENCE)
    settings = {"preset": "paper", "denominators": "sequences", "reward_model": {"enabled": False}}
    oreal = Oreal(OrealConfig.model_validate(settings), PLAN, 0, policy, reference, None)
    metrics = oreal.update(GROUPS, 0)
    positive, negative = (3.0 + 4.5) / 4, 0.5 * (0.75 * 3 + 0.25 * 1) / 4
    divergence = (1 - log(2)) + (log(2) - 0.5)
    assert metrics["policy/loss_positive"] == pytest.approx(positive)
    assert metrics["policy/loss_negative"] == pytest.approx(negative)
    assert metrics["policy/kl"] == pytest.approx(divergence / 9)  # in nats a token, whatever divides the loss
    assert metrics["policy/loss"] == pytest.approx(positive + negative + 0.01 * divergence / 4)


def test_without_a_reward_model_weights_are_one_and_nothing_is_frozen(table_model: Any) -> None:
    policy = table_model("policy", LOGPROBS)
    oreal = Oreal(OrealConfig(), PLAN, 0, policy, table_model("reference", LOGPROBS), None)
    metrics = oreal.update(GROUPS, 0)
    assert metrics["policy/loss_positive"] == pytest.approx((2 * (1 + 2) + 2 / 3 * (0.5 + 3 + 1)) / 5)
    assert metrics["policy/loss_negative"] == pytest.approx(0.5 * (2 / 3 * 3 + 2) / 4)
    assert metrics["policy/weight_positive"] == metrics["policy/weight_negative"] == 1
    assert policy.gradients[0][32] == pytest.approx(-2 / 3 / 5)


@pytest.mark.parametrize(
    "groups",
    [
        [],
        [make_group([1], ([10], "correct"), ([11], "correct"))],
        [make_group([1], ([10], "incorrect"), ([11], "too_long"))],
        [make_group([1], ([10], "correct"), ([11], "timeout"), ([12], "crash"), ([13], None))],
        [make_group([1], ([10], "timeout"), ([11], "crash"))],
    ],
    ids=["none", "all-correct", "all-incorrect", "correct-and-unjudged", "unjudged"],
)
def test_without_a_usable_group_the_step_is_skipped(table_model: Any, groups: list[Group]) -> None:
    policy, reward_model = table_model("policy", {}), table_model("reward_model", {}, scores=True)
    oreal = Oreal(make_config(selection="all"), PLAN, 0, policy, table_model("reference", {}), reward_model)
    assert oreal.update(groups, 0) == {"train/skipped": 1.0}
    assert policy.batches == reward_model.batches == []


@pytest.mark.parametrize("selection", ["all", "one_pair"])
def test_samples_without_a_verdict_count_nowhere(selection: str) -> None:
    judged = [([10], "correct"), ([11], "incorrect"), ([12], "rejected")]
    unjudged = [([20], "timeout"), ([21], "crash"), ([22], None)]
    mixed = [unjudged[0], judged[0], unjudged[1], judged[1], unjudged[2], judged[2]]
    for negative_weight in ("advantage", "one_minus_pass_rate"):
        config = make_config(selection=selection, negative_weight=negative_weight)
        expected = select_sequences([make_group([1], *judged)], config, random.Random(0))  # type: ignore[arg-type]
        found = select_sequences([make_group([1], *mixed)], config, random.Random(0))  # type: ignore[arg-type]
        assert found == expected
        assert found[0].advantage == pytest.approx(2.0)  # 1 - mean of (-1, -1), not of five
        assert found[1].advantage == pytest.approx(-1.0 if negative_weight == "advantage" else -2 / 3)


def test_several_policy_updates_keep_the_old_policy(table_model: Any) -> None:
    """The second update's ratio and divergence are those to the policy before the first."""
    group = make_group([1], ([10], "correct"), ([20], "incorrect"))
    policy = table_model("policy", {10: -1.0, 20: -1.0}, lr=0.5)
    config = make_config(kl_target="old", kl_coef=1.0)
    metrics = Oreal(config, PLAN, 0, policy, None, None, policy_updates=2).update([group], 0)
    # Advantages +-2, one token of each kind: first gradient -2 and 0.5 * 2, so 10 rises by 1 and 20 falls by 0.5.
    assert policy.gradients[0] == pytest.approx({10: -2.0, 20: 1.0})
    assert metrics["policy/loss_positive"] == pytest.approx(0.0)
    assert metrics["policy/loss_negative"] == pytest.approx(exp(-0.5))
    assert metrics["policy/kl"] == pytest.approx(((exp(-1) + 1 - 1) + (exp(0.5) - 0.5 - 1)) / 2)
    expected = {10: -2.0 + (1 - exp(-1)) / 2, 20: exp(-0.5) + (1 - exp(0.5)) / 2}
    assert policy.gradients[1] == pytest.approx(expected)


def test_token_weights_come_from_the_scores_before_the_reward_models_updates(table_model: Any) -> None:
    reward_model = table_model("reward_model", SCORES, scores=True, lr=10.0)
    policy, reference = table_model("policy", LOGPROBS), table_model("reference", REFERENCE)
    oreal = Oreal(make_config(), PLAN, 0, policy, reference, reward_model, reward_model_updates=3)
    metrics = oreal.update(GROUPS, 0)
    assert len(reward_model.gradients) == 3
    assert metrics["policy/weight_positive"] == pytest.approx((0.5 + 0.75 + 0.5) / 5)
    assert metrics["reward_model/loss"] < (2 * log(8 / 7) + log(4) + log(4 / 3)) / 4


def test_a_divergence_to_the_initial_policy_needs_the_reference(table_model: Any) -> None:
    with pytest.raises(AssertionError, match="needs the reference"):
        Oreal(make_config(), PLAN, 0, table_model("policy", {}), None, None)
    Oreal(make_config(kl_coef=0.0), PLAN, 0, table_model("policy", {}), None, None).update(GROUPS, 0)


def picks(table_model: Any, seed: int, step: int, plan: PackingPlan = PLAN, warm_up: int = 0) -> list[int]:
    groups, tables = random_groups()
    oreal = Oreal(make_config(kl_coef=0.0), plan, seed, table_model("policy", tables[0]), None, None)
    for earlier in range(warm_up):
        oreal.update(groups, earlier)
    oreal.update(groups, step)
    batch = oreal.policy.batches[-1]  # type: ignore[attr-defined]
    return sorted(token for m in batch.microbatches for token in m.labels[m.loss_mask].tolist())


def test_the_pair_depends_on_seed_and_step_only(table_model: Any) -> None:
    chosen = picks(table_model, seed=1, step=5)
    random.seed(123)
    torch.manual_seed(123)
    assert picks(table_model, seed=1, step=5, warm_up=3) == chosen  # a resumed run picks what the unbroken one does
    ranks = [picks(table_model, seed=1, step=5, plan=PackingPlan(rank, 2, 1000)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == chosen
    assert len({tuple(picks(table_model, seed=1, step=step)) for step in range(30)}) > 5
    assert len({tuple(picks(table_model, seed=seed, step=5)) for seed in range(30)}) > 5


def test_each_sample_of_a_kind_is_picked_equally_often() -> None:
    group = make_group([1], *(([token], "correct") for token in range(10, 14)), ([20], "incorrect"))
    found = Counter(
        select_sequences([group], make_config(), random.Random(f"0-{step}"))[0].response_ids[0] for step in range(2000)
    )
    assert set(found) == {10, 11, 12, 13} and all(400 < count < 600 for count in found.values())
