"""A step of the outcome objectives against numbers worked out by hand, definitions in plain Python and enumeration."""

import itertools
from collections.abc import Sequence
from math import exp, log
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from megatron_oreal.algorithms.objectives import h_prime, sample_weights, weights
from megatron_oreal.algorithms.outcome import Outcome, check_objective, objective_table
from megatron_oreal.algorithms.sample_selection import first_correct
from megatron_oreal.config import OBJECTIVE_OPTIONS, Correction, OutcomeConfig
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict, VerdictStatus

PLAN = PackingPlan(0, 1, microbatch_tokens=1000)


def make_group(prompt: list[int], *samples: tuple[list[int], VerdictStatus | None]) -> Group:
    def make_sample(response: list[int], status: VerdictStatus | None) -> Sample:
        verdict = None if status is None else Verdict(float(status == "correct"), status, None)
        return Sample("", prompt, response, "", [], [-0.5] * len(response), "stop", 0, verdict)

    return Group(Prompt("", (Message("user", ""),), ""), [make_sample(*sample) for sample in samples])


def make_config(**settings: Any) -> OutcomeConfig:
    return OutcomeConfig(name="outcome", **settings)


def update(
    table_model: Any, config: OutcomeConfig, groups: Sequence[Group], logprobs: dict[int, float], **settings: Any
) -> tuple[dict[str, float], Any]:
    """(metrics, the policy after the update)"""
    policy = table_model("policy", logprobs, lr=settings.pop("lr", 0.0))
    reference = settings.pop("reference", None)
    reference = table_model("reference", reference) if reference is not None else None
    plan = settings.pop("plan", PLAN)
    return Outcome(config, plan, 4, policy, reference, **settings).update(groups, 0), policy


RARE = make_group([1], ([10, 11], "correct"), ([20], "incorrect"), ([21, 22], "incorrect"), ([23], "no_answer"))
FREQUENT = make_group([2, 3], ([30], "correct"), ([31, 32, 33], "correct"), ([34], "correct"), ([40], "incorrect"))
SOLVED = make_group([4], *(([token], "correct") for token in (50, 51, 52, 53)))
GROUPS = [RARE, FREQUENT, SOLVED]  # 6 + 6 + 4 tokens
LOGPROBS = {token: -0.1 * token for token in range(64)}
ROOT3 = 3**0.5


def test_grpo_by_hand(table_model: Any) -> None:
    """Standard deviation sqrt(3)/4: 3/4 and -1/4 become sqrt(3) and -1/sqrt(3); nothing where all are correct."""
    metrics, policy = update(table_model, make_config(), GROUPS, LOGPROBS)
    z = dict.fromkeys((10, 11), ROOT3) | dict.fromkeys((20, 21, 22, 23), -1 / ROOT3)
    z |= dict.fromkeys((30, 31, 32, 33, 34), 1 / ROOT3) | {40: -ROOT3}
    assert policy.gradients == [pytest.approx({token: -value / 16 for token, value in z.items()}, rel=1e-6)]
    d = {token: LOGPROBS[token] + 0.5 for token in z}
    assert metrics == pytest.approx(
        {
            "train/skipped": 0,
            "train/num_groups": 3,
            "train/num_sequences": 8,  # those of SOLVED weigh nothing and are left out, but for the denominator
            "train/num_tokens": 12,
            "policy/loss": -sum(z.values()) / 16,
            "policy/loss_surrogate": -sum(z.values()) / 16,
            "policy/entropy": 0.5,
            "policy/ratio_max": 1,
            "policy/clip_share": 0,
            "policy/mismatch": sum(map(abs, d.values())) / 12,
            "policy/mismatch_max": 3.5,
            "policy/mismatch_ratio": sum(exp(abs(value)) for value in d.values()) / 12,
            "policy/mismatch_kl_k1": -sum(d.values()) / 12,
            "policy/mismatch_kl_k3": sum(exp(value) - value - 1 for value in d.values()) / 12,
        },
        rel=1e-6,
    )


def test_off_policy_tokens_are_weighed(table_model: Any) -> None:
    """Twice as likely as the engine said, cut at 1.5; half as likely."""
    logprobs = LOGPROBS | {10: -0.5 + log(2), 11: -0.5 - log(2)}
    _, plain = update(table_model, make_config(), GROUPS, logprobs)
    metrics, policy = update(table_model, make_config(), GROUPS, logprobs, correction=Correction(importance_cap=1.5))
    (gradient,), (before,) = policy.gradients, plain.gradients
    assert gradient[10] == pytest.approx(1.5 * before[10], rel=1e-6)
    assert gradient[11] == pytest.approx(0.5 * before[11], rel=1e-6)
    assert metrics["policy/importance_capped_share"] == pytest.approx(1 / 12)
    assert metrics["policy/importance_max"] == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"normalisation": "token"}, (1 / 16, 1 / 16)),
        ({"normalisation": "sequence"}, (1 / 12 / 2, 1 / 12 / 3)),
        ({"normalisation": "constant"}, (1 / 12, 1 / 12)),
        ({"normalisation": "constant", "constant_tokens": 50}, (1 / 600, 1 / 600)),
        ({"normalisation": "token", "dynamic_sampling": True}, (1 / 12, 1 / 12)),
        ({"normalisation": "sequence", "dynamic_sampling": True}, (1 / 8 / 2, 1 / 8 / 3)),
        ({"normalisation": "constant", "dynamic_sampling": True}, (1 / 8, 1 / 8)),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_normalisations_by_hand(table_model: Any, settings: dict[str, Any], shares: tuple[float, float]) -> None:
    """The shares of a token of [10, 11], weight sqrt(3), and of [31, 32, 33], weight 1/sqrt(3)."""
    metrics, policy = update(table_model, make_config(**settings), GROUPS, LOGPROBS)
    (gradient,) = policy.gradients
    assert [gradient[token] for token in (10, 11)] == pytest.approx([-ROOT3 * shares[0]] * 2)
    assert [gradient[token] for token in (31, 32, 33)] == pytest.approx([-shares[1] / ROOT3] * 3)
    assert metrics["train/num_groups"] == (2 if "dynamic_sampling" in settings else 3)


OBJECTIVE_CHOICES: list[dict[str, Any]] = [
    {"objective": "reinforce"},
    {"objective": "rloo"},
    {"objective": "rejection_sampling"},
    {"objective": "grpo"},
    {"objective": "grpo", "std": "none"},
    {"objective": "grpo", "std": "bessel", "epsilon": 0.01},
    {"objective": "pass_at_n"},
    {"objective": "pass_at_n", "n": 2, "baseline": "none"},
    {"objective": "logit"},
    {"objective": "expression", "h": "log(t + 0.1)"},
    {"objective": "expression", "h": "log(t / (1 - t))", "smoothing": 0.125, "baseline": "none"},
]
LOSS_CHOICES: list[dict[str, Any]] = [
    {},
    {"ratio": "sequence"},
    {"normalisation": "sequence"},
    {"normalisation": "sequence", "ratio": "sequence", "clip_low": 0.05, "clip_high": 0.07},
    {"normalisation": "constant", "constant_tokens": 3},
    {"clip_high": 0.22},
    {"clip_low": None, "clip_high": 0.05},
    {"clip_low": 0.05, "clip_high": None},
    {"clip_low": None, "clip_high": None},
    {"kl_coef": 0.5},
    {"kl_coef": 0.5, "kl_kind": "mse", "dynamic_sampling": True},
    {"dynamic_sampling": True, "objective": "reinforce"},
]


def by_definition(
    groups: Sequence[Group], config: OutcomeConfig, new: Tensor, old: Tensor, reference: Tensor
) -> tuple[Tensor, float]:
    """(loss, share of clipped tokens) sequence by sequence. The tables hold each token's log-prob."""
    if config.dynamic_sampling:
        groups = [group for group in groups if 0 < group.pass_rate < 1]
    table_options = config.model_dump(
        include={name for name in OBJECTIVE_OPTIONS if config.objective in OBJECTIVE_OPTIONS[name]}
    )
    weighed: list[tuple[list[int], float]] = []
    for group in groups:
        rewards = torch.tensor([[float(sample.is_correct) for sample in group.samples]])
        z = sample_weights(config.objective, rewards, **table_options)[0].tolist()
        weighed += [(sample.response_ids, weight) for sample, weight in zip(group.samples, z, strict=True)]
    num_tokens = sum(len(tokens) for tokens, _ in weighed)
    num_trained = sum(len(tokens) for tokens, weight in weighed if weight != 0 or config.kl_coef)
    loss, clipped = torch.zeros(()).double(), 0
    for tokens, weight in weighed:
        ratios = [(new[token] - old[token]).exp() for token in tokens]
        if config.ratio == "sequence":
            ratios = [(torch.stack([new[t] - old[t] for t in tokens]).sum() / len(tokens)).exp()] * len(tokens)
        share = {
            "token": 1 / num_tokens,
            "sequence": 1 / (len(weighed) * len(tokens)),
            "constant": 1 / (len(weighed) * config.constant_tokens),
        }[config.normalisation]
        for token, ratio in zip(tokens, ratios, strict=True):
            low = 0.0 if config.clip_low is None else 1 - config.clip_low
            high = 1e9 if config.clip_high is None else 1 + config.clip_high
            near = ratio if low <= ratio.item() <= high else torch.tensor(low if ratio.item() < low else high).double()
            loss = loss - share * min(ratio * weight, near * weight)
            clipped += (near is not ratio) and (weight != 0 or config.kl_coef > 0)
            if config.kl_coef:
                d = reference[token] - new[token]
                loss = loss + config.kl_coef / num_tokens * (d.exp() - d - 1 if config.kl_kind == "k3" else d * d / 2)
    return loss, clipped / num_trained


@pytest.mark.parametrize(
    "choice",
    [*OBJECTIVE_CHOICES, *LOSS_CHOICES],
    ids=lambda choice: ",".join(f"{k}={v}" for k, v in choice.items()) or "-",
)
def test_each_choice_over_two_updates(table_model: Any, choice: dict[str, Any]) -> None:
    """The second update's ratios are those to the policy before the first one, which was large enough to clip."""
    config = make_config(**choice)
    reference = {token: value + 0.3 * (-1) ** token for token, value in LOGPROBS.items()}
    metrics, policy = update(
        table_model,
        config,
        GROUPS,
        LOGPROBS,
        reference=reference if config.kl_coef else None,
        lr=2.0,
        policy_updates=2,
    )
    old = torch.tensor([LOGPROBS[token] for token in range(64)], dtype=torch.float64)
    target = torch.tensor([reference[token] for token in range(64)], dtype=torch.float64)
    new = old.clone()
    for found in policy.gradients:
        new.requires_grad_()
        loss, clip_share = by_definition(GROUPS, config, new, old, target)
        (gradient,) = torch.autograd.grad(loss, new)
        for token in range(64):
            assert found.get(token, 0.0) == pytest.approx(gradient[token].item(), rel=1e-5, abs=1e-8), token
        new = (new - 2.0 * gradient).detach()
    assert metrics["policy/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["policy/clip_share"] == pytest.approx(clip_share)
    assert ("policy/kl" in metrics) == (config.kl_coef > 0)
    if choice in ({}, {"clip_high": 0.22}):
        assert clip_share > 0  # else nothing was tested


def test_clipping_stops_only_what_went_far_enough(table_model: Any) -> None:
    """One correct token rose by 1/4, the other by 1/2 at a bound of 0.4: e^0.25 goes on, e^0.5 stops."""
    group = make_group([1], ([10], "correct"), ([20], "incorrect"))
    config = make_config(objective="reinforce", normalisation="constant", clip_high=0.4)
    _, policy = update(table_model, config, [group], {10: -1.0, 20: -1.0}, lr=0.5, policy_updates=3)
    assert policy.gradients == [{10: -0.5}, {10: pytest.approx(-0.5 * exp(0.25))}, {}]
    assert policy.table[10].item() == pytest.approx(-1 + 0.25 + 0.25 * exp(0.25))


@pytest.mark.parametrize("choice", OBJECTIVE_CHOICES, ids=lambda choice: ",".join(map(str, choice.values())))
def test_the_expected_gradient_is_that_of_h(table_model: Any, choice: dict[str, Any]) -> None:
    """Softmax over four answers of one token, two correct, three samples: all 64 draws give h'(p) grad p."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.2], dtype=torch.float64)
    policy = logits.softmax(0)
    correct = torch.tensor([True, False, True, False])
    scores = torch.eye(4, dtype=torch.float64) - policy  # row y: the gradient of log pi(y) by the logits
    config = make_config(normalisation="constant", **choice)
    table = {token + 10: float(policy[token].log()) for token in range(4)}
    expected_update = torch.zeros(4, dtype=torch.float64)
    for draw in itertools.product(range(4), repeat=3):
        group = make_group([1], *(([y + 10], "correct" if correct[y] else "incorrect") for y in draw))
        model = table_model("policy", table)
        Outcome(config, PLAN, 3, model).update([group], 0)
        for token, slope in (model.gradients[0] if model.gradients else {}).items():
            expected_update -= policy[list(draw)].prod() * slope * scores[token - 10]
    pass_rate = float(policy[correct].sum())
    a, b = objective_table(config, 3)
    ascent = (policy[correct, None] * scores[correct]).sum(dim=0)
    torch.testing.assert_close(expected_update, h_prime(a, b, pass_rate) * ascent, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"normalisation": "sequence"},
        {"normalisation": "constant"},
        {"ratio": "sequence", "normalisation": "sequence"},
        {"kl_coef": 0.5},
        {"objective": "rejection_sampling", "dynamic_sampling": True},
        {"objective": "pure_rejection_sampling", "num_correct": 2},
    ],
    ids=lambda choice: ",".join(f"{k}={v}" for k, v in choice.items()) or "-",
)
@pytest.mark.parametrize(("num_ranks", "microbatch_tokens"), [(1, 1), (2, 1000), (2, 7), (13, 1000)])
def test_microbatches_and_ranks_change_nothing(
    table_model: Any, choice: dict[str, Any], num_ranks: int, microbatch_tokens: int
) -> None:
    """All in one micro-batch, one sequence in each, and ranks that have only filler: the same loss and gradients."""

    def run(plan: PackingPlan) -> tuple[dict[str, float], dict[int, float]]:
        reference = dict.fromkeys(LOGPROBS, -2.0) if "kl_coef" in choice else None
        metrics, policy = update(table_model, make_config(**choice), GROUPS, LOGPROBS, reference=reference, plan=plan)
        return metrics, policy.gradients[0]

    expected, expected_gradient = run(PLAN)
    ranks = [run(PackingPlan(rank, num_ranks, microbatch_tokens)) for rank in range(num_ranks)]
    for name, value in expected.items():
        combine = max if name.startswith("train/") or name.endswith("_max") else sum
        assert combine(metrics[name] for metrics, _ in ranks) == pytest.approx(value, rel=1e-5), name
    total = {token: sum(gradient.get(token, 0.0) for _, gradient in ranks) for token in range(64)}
    assert total == pytest.approx(dict.fromkeys(range(64), 0.0) | expected_gradient, rel=1e-5, abs=1e-8)


def test_with_a_divergence_samples_without_weight_stay(table_model: Any) -> None:
    """All 16 tokens are pulled towards the reference, in SOLVED only that."""
    reference = {token: value + log(2) for token, value in LOGPROBS.items()}
    metrics, policy = update(table_model, make_config(kl_coef=0.1), GROUPS, LOGPROBS, reference=reference)
    assert metrics["train/num_tokens"] == 16
    assert metrics["policy/kl"] == pytest.approx(1 - log(2))
    assert policy.gradients[0][50] == pytest.approx(-0.1 / 16)
    assert policy.gradients[0][10] == pytest.approx(-ROOT3 / 16 - 0.1 / 16)
    with pytest.raises(AssertionError, match="needs the reference"):
        Outcome(make_config(kl_coef=0.1), PLAN, 4, table_model("policy", {}))


def test_samples_without_a_verdict_count_nowhere(table_model: Any) -> None:
    judged = (([10], "correct"), ([11], "incorrect"), ([12], "rejected"))
    mixed = (([20], "timeout"), judged[0], ([21], "crash"), judged[1], ([22], None), judged[2])
    for choice in OBJECTIVE_CHOICES:
        _, expected = update(table_model, make_config(**choice), [make_group([1], *judged)], LOGPROBS)  # type: ignore[arg-type]
        _, found = update(table_model, make_config(**choice), [make_group([1], *mixed)], LOGPROBS)  # type: ignore[arg-type]
        assert found.gradients == expected.gradients != []


def test_groups_with_too_few_verdicts_are_left_out_or_scored_as_far_as_they_go(table_model: Any) -> None:
    alone = make_group([1], ([10], "correct"), ([11], "timeout"))
    assert update(table_model, make_config(), [alone], LOGPROBS)[0] == {"train/skipped": 1.0}
    three = make_group([1], ([10], "correct"), ([11], "incorrect"), ([12], "incorrect"), ([13], "timeout"))
    config = make_config(objective="pass_at_n", n=4, normalisation="constant")
    _, policy = update(table_model, config, [three], LOGPROBS)
    _, b = weights("pass_at_n", 3, n=3)
    assert policy.gradients[0] == pytest.approx({10: -b[0].item() / 3})


@pytest.mark.parametrize(
    ("groups", "choice"),
    [
        ([], {}),
        ([SOLVED], {}),
        ([SOLVED], {"objective": "reinforce", "dynamic_sampling": True}),
        ([make_group([1], ([10], "incorrect"), ([11], "too_long"))], {"objective": "reinforce"}),
        ([make_group([1], ([10], "incorrect"), ([11], "too_long"))], {"objective": "pure_rejection_sampling"}),
        ([make_group([1], ([10], "timeout"), ([11], "crash"))], {"objective": "reinforce"}),
    ],
)
def test_without_any_weight_the_step_is_skipped(table_model: Any, groups: list[Group], choice: dict[str, Any]) -> None:
    metrics, policy = update(table_model, make_config(**choice), groups, LOGPROBS)
    assert metrics == {"train/skipped": 1.0} and policy.batches == []


def test_reinforce_trains_on_groups_of_one_kind(table_model: Any) -> None:
    _, policy = update(table_model, make_config(objective="reinforce"), [SOLVED], LOGPROBS)
    assert policy.gradients[0] == pytest.approx(dict.fromkeys((50, 51, 52, 53), -0.25))


def test_pure_rejection_sampling_takes_the_first_correct_ones(table_model: Any) -> None:
    """Two of each group, one where there is no second: five equal sequences of 2 + 1 + 3 + 1 + 1 tokens."""
    config = make_config(objective="pure_rejection_sampling", num_correct=2, normalisation="constant")
    metrics, policy = update(table_model, config, GROUPS, LOGPROBS)
    assert metrics["train/num_sequences"] == 5
    assert policy.gradients[0] == pytest.approx(dict.fromkeys((10, 11, 30, 31, 32, 33, 50, 51), -1 / 5))
    assert [sample.response_ids.tolist() for sample in first_correct(FREQUENT.samples, 2)] == [[30], [31, 32, 33]]
    assert first_correct(RARE.samples, 2) == [RARE.samples[0]] and first_correct([], 2) == []


def test_pure_rejection_sampling_is_unbiased_for_log_p() -> None:
    """The first of up to 12 draws that is correct, given that there is one: grad log p exactly."""
    policy = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    scores = torch.eye(4, dtype=torch.float64) - policy
    pass_rate, total, mass = 0.3, torch.zeros(4, dtype=torch.float64), 0.0
    for place in range(12):
        for answer in (0, 2):  # the correct ones
            draws = make_group([1], *[([9], "incorrect")] * place, ([answer], "correct"), ([0], "correct"))
            (kept,) = first_correct(draws.samples, 1)
            probability = (1 - pass_rate) ** place * policy[answer]
            total += probability * scores[kept.response_ids[0]]
            mass += float(probability)
    ascent = policy[0] * scores[0] + policy[2] * scores[2]
    torch.testing.assert_close(total / mass, ascent / pass_rate)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "expression"}, "algorithm.h is required for algorithm.objective=expression"),
        (
            {"h": "t"},
            "algorithm.h has no meaning for algorithm.objective=grpo: drop it, or set algorithm.objective to exp",
        ),
        ({"objective": "rloo", "std": "bessel"}, "algorithm.std has no meaning for algorithm.objective=rloo"),
        ({"objective": "rloo", "n": 3}, "algorithm.n has no meaning"),
        (
            {"objective": "rloo", "baseline": "none"},
            "algorithm.baseline has no meaning .* to pass_at_n or logit or exp",
        ),
        ({"num_correct": 2}, "algorithm.num_correct has no meaning"),
        ({"constant_tokens": 100}, "algorithm.constant_tokens has no meaning for algorithm.normalisation=token"),
        ({"objective": "best"}, "Input should be 'reinforce', 'rloo'"),
        ({"clip_low": 0.0}, "greater than 0"),
        ({"clip_low": 1.5}, "less than or equal to 1"),
        ({"clip_high": -0.1}, "greater than 0"),
        ({"kl_coef": -1}, "greater than or equal to 0"),
        ({"epsilon": float("nan")}, "finite number"),
        ({"num_correct": 0}, "greater than 0"),
        ({"clip": 0.2}, "Extra inputs"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_config(**settings)


def test_resolved_settings_can_be_read_again() -> None:
    for choice in [*OBJECTIVE_CHOICES, *LOSS_CHOICES]:
        config = make_config(**choice)
        assert OutcomeConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    ("choice", "group_size", "message"),
    [
        ({"objective": "rloo"}, 1, "group_size must be >= 2"),
        ({"objective": "pass_at_n", "n": 9}, 8, r"algorithm\.n=9 must be <= rollout\.group_size=8: lower it"),
        ({"objective": "expression", "h": "log(t)"}, 8, "h diverges or has no real value at t=0: set smoothing"),
        ({"objective": "expression", "h": "import os"}, 8, "h: 'import' at character 1 is not in the grammar"),
    ],
)
def test_an_objective_is_checked_before_anything_runs(
    table_model: Any, choice: dict[str, Any], group_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Outcome(make_config(**choice), PLAN, group_size, table_model("policy", {}))
    with pytest.raises(ValueError, match=message):
        check_objective(make_config(**choice), group_size)
    check_objective(make_config(objective="reinforce"), 1)
    check_objective(make_config(objective="pure_rejection_sampling"), 1)
