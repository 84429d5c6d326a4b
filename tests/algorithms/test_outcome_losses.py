"""The losses and filters that papers add to the weighted log-prob loss, against numbers worked out by hand."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from megatron_oreal.algorithms.advantages import normalised, overlong_penalty
from megatron_oreal.algorithms.covariance import covariances, hold_back, random_keys, seed_of_step
from megatron_oreal.algorithms.objectives import sample_weights
from megatron_oreal.algorithms.oreal import Oreal
from megatron_oreal.algorithms.outcome import Outcome, fill_coefficients
from megatron_oreal.algorithms.ppo import Ppo
from megatron_oreal.config import OrealConfig, OutcomeConfig, PpoConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import Batch, FinishReason, Group, Message, Prompt, Sample, TrainingSequence, Verdict
from tests.support.paths import ROOT

PLAN = PackingPlan(0, 1, microbatch_tokens=1000)


def sample(response: list[int], correct: bool, finish: FinishReason = "stop") -> Sample:
    verdict = Verdict(float(correct), "correct" if correct else "incorrect", None)
    engine = [-0.5] * len(response)
    return Sample("", [1], response, "", engine, engine, finish, 0, verdict)  # type: ignore[arg-type]


def group(*samples: Sample) -> Group:
    return Group(Prompt("", (Message("user", ""),), ""), list(samples))


def make_config(**settings: Any) -> OutcomeConfig:
    return OutcomeConfig(name="outcome", **settings)


def update(
    table_model: Any, config: OutcomeConfig, groups: Sequence[Group], table: dict[int, float], **settings: Any
) -> tuple[dict[str, float], Any]:
    policy = table_model("policy", table, lr=settings.pop("lr", 0.0))
    reference = settings.pop("reference", None)
    plan = settings.pop("plan", PLAN)
    frozen = None if reference is None else table_model("reference", reference)
    outcome = Outcome(config, plan, len(groups[0].samples), policy, frozen, **settings)
    return outcome.update(groups, 0), policy


PAIR = group(sample([10], True), sample([20, 21], False))  # Dr. GRPO's weights are 1/2 and -1/2.
TABLE = {10: -1.0, 20: -2.0, 21: -3.0}
DR_GRPO = {"objective": "grpo", "std": "none"}


# CISPO: every token keeps its gradient, times the clipped ratio.


def test_cispo_weighs_log_probs_with_the_clipped_ratio(table_model: Any) -> None:
    """The first update moves log-probs by 1/6; from the second on 10 is clipped at 1.1, 20 and 21 go below 0.95."""
    config = make_config(**DR_GRPO, surrogate="cispo", clip_low=0.05, clip_high=0.1)
    metrics, policy = update(table_model, config, [PAIR], TABLE, lr=1.0, policy_updates=2)
    first = {10: -1 / 6, 20: 1 / 6, 21: 1 / 6}
    second = {10: -1.1 / 6, 20: 0.95 / 6, 21: 0.95 / 6}
    assert policy.gradients == [pytest.approx(first, rel=1e-5), pytest.approx(second, rel=1e-5)]
    assert metrics["policy/clip_share"] == 1.0
    logprobs = {token: TABLE[token] - first[token] for token in TABLE}
    assert metrics["policy/loss"] == pytest.approx(sum(second[t] * logprobs[t] for t in TABLE), rel=1e-5)
    # PPO's gain stops there.
    _, clipped = update(
        table_model, make_config(**DR_GRPO, clip_low=0.05, clip_high=0.1), [PAIR], TABLE, lr=1.0, policy_updates=2
    )
    assert clipped.gradients[1] == {}


def test_cispo_without_a_lower_bound(table_model: Any) -> None:
    config = make_config(**DR_GRPO, surrogate="cispo", clip_low=None, clip_high=5.0)
    _, policy = update(table_model, config, [PAIR], TABLE, lr=1.0, policy_updates=2)
    expected = {10: -exp(1 / 6) / 6, 20: exp(-1 / 6) / 6, 21: exp(-1 / 6) / 6}
    assert policy.gradients[1] == pytest.approx(expected, rel=1e-5)


# Clip-Cov and KL-Cov.

# Log-probs -1, -2, -3 with the mean -2, weights 1/2, -1/2, -1/2 with the mean -1/6: covariances 2/3, 0, 1/3.
COVARIANCES = [2 / 3, 0.0, 1 / 3]


def test_covariances_by_hand(table_model: Any) -> None:
    config = make_config(**DR_GRPO, covariance="kl", covariance_share=0.4)  # One of three tokens.
    metrics, _ = update(table_model, config, [PAIR], TABLE)
    assert metrics["train/covariance_mean"] == pytest.approx(sum(COVARIANCES) / 3)
    assert metrics["train/covariance_chosen_share"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("share", "held_back"), [(0.4, {10}), (0.7, {10, 21}), (1.0, {10, 20, 21})])
def test_kl_cov_holds_the_tokens_of_the_highest_covariance_back(
    table_model: Any, share: float, held_back: set[int]
) -> None:
    """The second update's |log ratio| has the slope 1 or -1, over three tokens, times the coefficient 0.3."""
    config = make_config(
        **DR_GRPO, covariance="kl", covariance_share=share, covariance_coef=0.3, clip_low=None, clip_high=None
    )
    metrics, policy = update(table_model, config, [PAIR], TABLE, lr=1.0, policy_updates=2)
    moved = {10: 1 / 6, 20: -1 / 6, 21: -1 / 6}
    assert policy.gradients[0] == pytest.approx({token: -step for token, step in moved.items()}, rel=1e-5)
    expected = {
        token: -step * exp(step) + (0.1 if step > 0 else -0.1) * (token in held_back) for token, step in moved.items()
    }
    assert policy.gradients[1] == pytest.approx(expected, rel=1e-5)
    assert metrics["policy/covariance_penalty"] == pytest.approx(0.1 / 6 * len(held_back), rel=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "left"),
    [(0.5, 5.0, {20, 21}), (0.2, 0.5, {10, 20}), (0.2, 5.0, {20}), (0.7, 5.0, {10, 20, 21}), (-1.0, 5.0, set())],
)
def test_clip_cov_leaves_tokens_between_its_bounds_out(
    table_model: Any, low: float, high: float, left: set[int]
) -> None:
    config = make_config(**DR_GRPO, covariance="clip", covariance_share=1.0, covariance_low=low, covariance_high=high)
    _, policy = update(table_model, config, [PAIR], TABLE)
    expected = {token: slope for token, slope in {10: -1 / 6, 20: 1 / 6, 21: 1 / 6}.items() if token in left}
    assert policy.gradients == [pytest.approx(expected, rel=1e-5)]


MANY = [TrainingSequence([1], list(range(2, 2 + length)), (-1.0) ** length, True) for length in range(1, 30)]


def kept_batch(plan: PackingPlan, config: OutcomeConfig) -> Batch:
    batch = pack(MANY, plan)
    for microbatch in batch.microbatches:
        fill_coefficients(microbatch, batch.num_sequences, batch.num_tokens, config)
        microbatch.old_logprobs = -0.1 * microbatch.labels * microbatch.loss_mask
    return batch


def left_out(batch: Batch) -> set[tuple[int, int]]:
    """(length of the sequence, place) of the chosen tokens."""
    found = set()
    for part in batch.microbatches:
        assert part.coefficients is not None
        for position, place in zip(part.trained.tolist(), part.trained_places.tolist(), strict=True):
            is_chosen = part.coefficients[position] == 0 if part.penalties is None else part.penalties[position] > 0
            if is_chosen:
                found.add((part.lengths[int(part.sequence_ids[position])] - 1, place))
    return found


def test_clip_cov_draws_at_random_and_another_draw_each_step() -> None:
    config = make_config(**DR_GRPO, covariance="clip", covariance_share=0.1, covariance_low=-99, covariance_high=99)
    draws = []
    for step in (0, 1, 0):
        batch = kept_batch(PLAN, config)
        hold_back(batch, config, PLAN, seed_of_step(7, step), lambda values: values)
        draws.append(left_out(batch))
    assert len(draws[0]) == len(draws[1]) == int(0.1 * 435) and draws[0] == draws[2] != draws[1]
    (microbatch,) = pack(MANY, PLAN).microbatches
    keys = random_keys(microbatch, 3)
    assert 0.45 < keys.mean() < 0.55 and 0.07 < keys.var() < 0.1 and len(set(keys.tolist())) == 435


@dataclass
class Ranks:
    """The sums over several data-parallel ranks, each a thread."""

    count: int
    parts: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.count)

    def summed(self, rank: int, values: Tensor) -> Tensor:
        self.barrier.wait(10)
        self.parts[rank] = values.clone()
        self.barrier.wait(10)
        return torch.stack([self.parts[part] for part in range(self.count)]).sum(dim=0)


@pytest.mark.parametrize("kind", ["clip", "kl"])
@pytest.mark.parametrize(("num_ranks", "microbatch_tokens"), [(1, 1), (3, 40), (2, 1000)])
def test_the_layout_changes_no_choice(kind: str, num_ranks: int, microbatch_tokens: int) -> None:
    bounds = {"covariance_low": -0.5, "covariance_high": 0.6} if kind == "clip" else {}
    config = make_config(**DR_GRPO, covariance=kind, covariance_share=0.1, **bounds)
    whole = kept_batch(PLAN, config)
    expected = hold_back(whole, config, PLAN, 5, lambda values: values)
    ranks, found, metrics = Ranks(num_ranks), [set[tuple[int, int]]() for _ in range(num_ranks)], {}

    def work(rank: int) -> None:
        plan = PackingPlan(rank, num_ranks, microbatch_tokens)
        batch = kept_batch(plan, config)
        metrics[rank] = hold_back(batch, config, plan, 5, lambda values: ranks.summed(rank, values))
        found[rank] = left_out(batch)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set.union(*found) == left_out(whole) and len(left_out(whole)) == {"clip": 43, "kl": 44}[kind]  # two tie
    assert all(metrics[rank] == pytest.approx(expected) for rank in range(num_ranks))


def test_a_rank_with_only_filler_has_no_covariance() -> None:
    batch = pack(MANY[:1], PackingPlan(1, 2, 100))
    batch.microbatches[0].old_logprobs = torch.zeros(2)
    products, mean = covariances(batch, lambda values: values)
    assert [len(product) for product in products] == [0] and mean == 0.0


# REINFORCE++: global whitening of rewards, or of rewards less their group's mean.

TRIPLE = [group(sample([10], True), sample([20, 21], False)), group(sample([30], True), sample([31], True))]


def test_reinforce_plus_plus(table_model: Any) -> None:
    """Rewards of the tokens 1, 0, 0, 1, 1: mean 3/5, standard deviation sqrt(6)/5."""
    metrics, policy = update(table_model, make_config(objective="reinforce", whiten_advantages=True), TRIPLE, TABLE)
    high, low = 2 / sqrt(6), -3 / sqrt(6)
    expected = {10: -high / 5, 30: -high / 5, 31: -high / 5, 20: -low / 5, 21: -low / 5}
    assert policy.gradients == [pytest.approx(expected, rel=1e-5)]
    assert metrics["train/advantage_mean"] == pytest.approx(3 / 5)
    assert metrics["train/advantage_std"] == pytest.approx(sqrt(6) / 5)


def test_reinforce_plus_plus_with_baseline(table_model: Any) -> None:
    """1/2, -1/2, -1/2, 0, 0: mean -1/10, variance 3/20 - 1/100; the samples of weight 0 are trained on too."""
    metrics, policy = update(table_model, make_config(**DR_GRPO, whiten_advantages=True), TRIPLE, TABLE)
    deviation = sqrt(0.15 - 0.01)
    advantages = {10: 0.6, 20: -0.4, 21: -0.4, 30: 0.1, 31: 0.1}
    expected = {token: -value / deviation / 5 for token, value in advantages.items()}
    assert policy.gradients == [pytest.approx(expected, rel=1e-5)]
    assert metrics["train/num_sequences"] == 4


@pytest.mark.parametrize("correct", [True, False])
def test_nothing_is_left_of_equal_rewards(table_model: Any, correct: bool) -> None:
    alike = [group(sample([10], correct), sample([20, 21], correct))]
    config = make_config(objective="reinforce", whiten_advantages=True)
    assert update(table_model, config, alike, TABLE)[0] == {"train/skipped": 1.0}


# DAPO's filter and punishment of long responses.


def test_the_filter_leaves_cut_samples_out_but_counts_them_in_advantages(table_model: Any) -> None:
    """Three of four are wrong, which sets the weights; the two cut ones are not in the denominators."""
    cut = group(
        sample([10], True), sample([20], False), sample([21, 22], False, "length"), sample([23], False, "length")
    )
    metrics, policy = update(table_model, make_config(**DR_GRPO, filter_overlong=True), [cut], TABLE)
    assert policy.gradients == [pytest.approx({10: -0.75 / 2, 20: 0.25 / 2}, rel=1e-5)]
    assert metrics["train/num_tokens"] == 2
    everything_cut = group(sample([10], True, "length"), sample([20], False, "length"))
    assert update(table_model, make_config(filter_overlong=True), [everything_cut], TABLE)[0] == {"train/skipped": 1.0}


def test_ppo_and_oreal_filter_too(table_model: Any) -> None:
    cut = group(sample([10], True), sample([20], False), sample([21, 22], False, "length"))
    policy, critic = table_model("policy", TABLE), table_model("critic", {}, scores=True)
    config = PpoConfig(name="ppo", critic_minibatches=1, whiten_advantages=False, filter_overlong=True)
    assert Ppo(config, PLAN, 0, policy, critic, None).update([cut], 0)["train/num_tokens"] == 2
    assert set(policy.gradients[0]) == {10} and set(critic.gradients[0]) == {1}
    for selection, sequences in (("one_pair", 2), ("mixed", 2)):
        settings: dict[str, Any] = {"reward_model": {"enabled": False}, "kl_coef": 0.0, "selection": selection}
        oreal = Oreal(OrealConfig(**settings, filter_overlong=True), PLAN, 0, table_model("policy", TABLE), None, None)
        assert oreal.update([cut], 0)["train/num_sequences"] == sequences
        only_cut = group(sample([10], True), sample([21], False, "length"))
        expected = {"one_pair": None, "mixed": 1}[selection]
        assert oreal.update([only_cut], 0).get("train/num_sequences") == expected


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(0, 0.0), (12, 0.0), (13, 0.25), (14, 0.5), (15, 0.75), (16, 1.0), (20, 1.0)]
)
def test_the_punishment_rises_over_the_last_tokens(num_tokens: int, expected: float) -> None:
    assert overlong_penalty(num_tokens, limit=16, interval=4) == expected


LONG = group(sample([10], True), sample([11, 12, 13], True), sample([20], False), sample([21, 22, 23, 24], False))
# With a limit of 4 and an interval of 2: 1 - 0, 1 - 1/2, 0 and -1.


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"objective": "reinforce"}, (1.0, 0.5, 0.0, -1.0)),
        ({"objective": "rloo"}, (7 / 6, 1 / 2, -1 / 6, -9 / 6)),
        ({"objective": "grpo", "std": "none"}, (7 / 8, 3 / 8, -1 / 8, -9 / 8)),
        (
            {"objective": "grpo"},
            tuple(value / sqrt((49 + 9 + 1 + 81) / 64 / 4) / 8 for value in (7, 3, -1, -9)),
        ),
        (
            {"objective": "grpo", "std": "bessel", "epsilon": 0.5},
            tuple(value / 8 / (sqrt((49 + 9 + 1 + 81) / 64 / 3) + 0.5) for value in (7, 3, -1, -9)),
        ),
        ({"objective": "reinforce", "overlong_penalty": 0.5}, (1.0, 0.75, 0.0, -0.5)),
    ],
    ids=str,
)
def test_long_responses_lose_a_part_of_their_reward(
    table_model: Any, settings: dict[str, Any], weights: tuple[float, ...]
) -> None:
    config = make_config(overlong_tokens=2, normalisation="constant", **settings)
    _, policy = update(table_model, config, [LONG], TABLE, longest_response=lambda _prompt: 4)
    first_tokens = {10: 0, 11: 1, 20: 2, 21: 3}
    found = policy.gradients[0]
    assert [-4 * found.get(token, 0.0) for token in first_tokens] == pytest.approx(list(weights), rel=1e-5)


def test_without_a_long_response_the_weights_are_those_of_the_table() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 5, [0.0] * 5], dtype=torch.float64)
    for std in ("population", "bessel", "none"):
        for epsilon in (0.0, 0.1) if std != "none" else (0.0,):
            expected = sample_weights("grpo", rewards, std=std, epsilon=epsilon)
            torch.testing.assert_close(normalised(rewards, std, epsilon), expected)


def test_equal_punished_rewards_of_a_group_weigh_nothing() -> None:
    """Three times 0.1 has a mean that is not 0.1 in floating point; 0/0 would be a large number."""
    assert normalised(torch.full((1, 3), 0.1, dtype=torch.float64)).tolist() == [[0.0] * 3]


# On-policy distillation: a teacher in the reference's place.

TEACHER = {10: -0.5, 20: -2.5, 21: -1.0}  # log-ratios to the policy: 1/2, -1/2, 2


def test_distillation_adds_the_teachers_log_ratio_to_each_tokens_weight(table_model: Any) -> None:
    config = make_config(objective="distillation", distill_coef=1.0)
    metrics, policy = update(table_model, config, [PAIR], TABLE, reference=TEACHER)
    assert policy.gradients == [pytest.approx({10: -0.5 / 3, 20: 0.5 / 3, 21: -2 / 3}, rel=1e-5)]
    assert metrics["policy/kl"] > 0 and metrics["train/num_tokens"] == 3
    mixed = make_config(**DR_GRPO, distill_coef=0.2)
    _, policy = update(table_model, mixed, [PAIR], TABLE, reference=TEACHER)
    expected = {10: -(0.5 + 0.1) / 3, 20: -(-0.5 - 0.1) / 3, 21: -(-0.5 + 0.4) / 3}
    assert policy.gradients == [pytest.approx(expected, rel=1e-5)]


def test_distillation_learns_from_groups_of_one_kind_and_from_its_kl_alone(table_model: Any) -> None:
    solved = group(sample([10], True), sample([20, 21], True))
    config = make_config(objective="distillation", kl_coef=2.0, kl_kind="mse")
    _, policy = update(table_model, config, [solved], TABLE, reference=TEACHER)
    expected = {10: 2 * -0.5 / 3, 20: 2 * 0.5 / 3, 21: 2 * -2 / 3}
    assert policy.gradients == [pytest.approx(expected, rel=1e-5)]


def test_the_expected_gradient_of_distillation_is_that_of_the_reverse_kl() -> None:
    """Softmax over four tokens: the mean of log(teacher / policy) grad log pi is -grad KL(policy || teacher)."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.2], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([1.0, 0.5, -0.3, 0.0], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad(-(logprobs.exp() * (logprobs - teacher)).sum(), logits, retain_graph=True)
    weights = (logprobs.exp() * (teacher - logprobs)).detach()
    (found,) = torch.autograd.grad((weights * logprobs).sum(), logits)
    torch.testing.assert_close(found, expected)


# Configuration.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "distillation"}, "algorithm.objective=distillation learns from the reference alone: raise"),
        ({"covariance_low": 6.0, "covariance": "clip"}, "algorithm.covariance_low=6 must be below algorithm.covarian"),
        ({"covariance": "both"}, "Input should be 'none', 'clip' or 'kl'"),
        ({"covariance_share": 0.0, "covariance": "kl"}, "greater than 0"),
        ({"overlong_tokens": -1}, "greater than or equal to 0"),
        ({"surrogate": "reinforce"}, "Input should be 'clip' or 'cispo'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_config(**settings)


def test_the_interval_of_the_punishment_fits_the_length_limit() -> None:
    sections = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rollout": {"max_new_tokens": 8}}
    algorithm = {"name": "outcome", "overlong_tokens": 9}
    with pytest.raises(ValidationError, match=r"algorithm\.overlong_tokens=9 must be <= rollout\.max_new_tokens=8"):
        TrainConfig.model_validate({"run_dir": Path("r"), "num_steps": 3, "algorithm": algorithm} | sections)


PAGE = (ROOT / "megatron_oreal" / "algorithms" / "README.md").read_text()
OF_PAPERS = PAGE[PAGE.index("| GRPO, Shao") : PAGE.index("`teacher` is a Hugging Face directory")]


@pytest.mark.parametrize("settings", re.findall(r"`(\{.*?\})`", OF_PAPERS))
def test_the_settings_of_each_paper_can_be_given(settings: str) -> None:
    algorithm = {"name": "outcome"} | yaml.safe_load(settings.replace("N}", "100}"))
    sections = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rollout": {"max_new_tokens": 20480}}
    sections |= {"policy": {"updates_per_step": 2}, "algorithm": algorithm}
    TrainConfig.model_validate({"run_dir": Path("r"), "num_steps": 3} | sections)
