"""The family of corrections for samples of another distribution, against values worked out by hand."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_oreal.algorithms.corrections import correction_metrics, correction_weights
from megatron_oreal.algorithms.losses import PolicyTerms
from megatron_oreal.algorithms.outcome import Outcome
from megatron_oreal.algorithms.ppo import Ppo
from megatron_oreal.config import Correction, OutcomeConfig, PpoConfig, RolloutConfig, TrainConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import Batch, Group, Message, Prompt, Sample, TokenOutputs, TrainingSequence, Verdict

PLAN = PackingPlan(0, 1, microbatch_tokens=100, token_multiple=11)
POSITIONS = torch.tensor([1, 2, 4, 5, 6])  # The trained ones: two of the first sequence and three of the second.


def batch_of_ratios(*ratios: float) -> Batch:
    """Two sequences whose five response tokens have these ratios of trainer to engine."""
    engine = [-2.0] * 5
    sequences = [
        TrainingSequence([11, 12], [13, 14], 1.0, True, engine[:2]),  # type: ignore[arg-type]
        TrainingSequence([21], [22, 23, 24], -1.0, False, engine[2:]),  # type: ignore[arg-type]
    ]
    batch = pack(sequences, PLAN)
    batch.microbatches[0].old_logprobs = torch.zeros(11).index_copy(
        0, POSITIONS, torch.tensor([value + log(ratio) for value, ratio in zip(engine, ratios, strict=True)])
    )
    return batch


def settings(**rollout: Any) -> Correction:
    """What TrainConfig makes of the settings."""
    found = RolloutConfig(**rollout).as_correction()
    assert found is not None
    return found


def weights(correction: Correction, *ratios: float) -> list[float]:
    (microbatch,) = batch_of_ratios(*ratios).microbatches
    found = correction_weights(microbatch, correction)
    outside = torch.ones(11, dtype=torch.bool)
    outside[POSITIONS] = False
    assert found[outside].tolist() == [1.0] * 6
    found_values: list[float] = found[POSITIONS].tolist()
    return found_values


RATIOS = (0.5, 8.0, 1.5, 1.25, 0.1)  # Products 4 and 0.1875, geometric means 2 and 0.5724.


@pytest.mark.parametrize(
    ("rollout", "expected"),
    [
        ({}, [0.5, 2.0, 1.5, 1.25, 0.1]),
        ({"correction": "tis", "importance_cap": 1.3}, [0.5, 1.3, 1.3, 1.25, 0.1]),
        ({"correction": "sequence_tis"}, [2.0, 2.0, 0.1875, 0.1875, 0.1875]),
        ({"correction": "sequence_tis", "importance_cap": 10}, [4.0, 4.0, 0.1875, 0.1875, 0.1875]),
        ({"correction": "mis"}, [0.5, 0.0, 1.5, 1.25, 0.1]),
        ({"correction": "mis", "mask_high": 9}, [0.5, 8.0, 1.5, 1.25, 0.1]),
        ({"correction": "sequence_mis"}, [0.0, 0.0, 0.1875, 0.1875, 0.1875]),
        ({"correction": "icepop"}, [0.5, 0.0, 1.5, 1.25, 0.0]),
        ({"correction": "icepop", "mask_high": 8.5, "mask_low": 0.0}, [0.5, 8.0, 1.5, 1.25, 0.1]),
        ({"correction": "geometric"}, [0.0] * 5),
        ({"correction": "geometric", "mask_low": 0.5, "mask_high": 1.9}, [0.0, 0.0, 1.0, 1.0, 1.0]),
        ({"correction": "geometric", "mask_low": 0.5, "mask_high": 2.1, "mask_veto": 0.2}, [1.0, 1.0, 0.0, 0.0, 0.0]),
        # Token weights within sequences that the mask keeps.
        ({"mask_level": "geometric", "mask_low": 0.5, "mask_high": 1.9}, [0.0, 0.0, 1.5, 1.25, 0.1]),
        ({"mask_veto": 0.2}, [0.5, 2.0, 0.0, 0.0, 0.0]),
        ({"importance_cap": None, "mask_level": "token", "mask_low": 0.2}, [1.0, 0.0, 1.0, 1.0, 0.0]),
        ({"importance_level": "sequence", "mask_level": "token"}, [2.0, 0.0, 0.1875, 0.1875, 0.1875]),
    ],
    ids=str,
)
def test_weights_by_hand(rollout: dict[str, Any], expected: list[float]) -> None:
    assert weights(settings(**rollout), *RATIOS) == pytest.approx(expected, rel=1e-5)


def test_bounds_keep_what_lies_on_them_and_samples_of_the_policy_itself() -> None:
    for preset in ("tis", "sequence_tis", "mis", "sequence_mis", "icepop", "geometric"):
        assert weights(settings(correction=preset), 1.0, 1.0, 1.0, 1.0, 1.0) == [1.0] * 5
    assert weights(Correction(9.0, mask_level="token", mask_low=0.5, mask_high=2.0), 0.5, 2.0, 1, 1, 1)[:2] == (
        pytest.approx([0.5, 2.0])
    )


def test_extreme_ratios_stay_finite() -> None:
    """A long sequence's product neither overflows nor becomes 0; bounds of e^20 and e^-20."""
    for sign in (1, -1):
        ratios = [exp(15 * sign)] * 5
        found = weights(Correction(importance_cap=1e12, importance_level="sequence"), *ratios)
        assert found == pytest.approx([exp(20 * sign)] * 5, rel=1e-4)
    assert weights(settings(correction="sequence_mis"), *[exp(-15)] * 5) == pytest.approx([exp(-20)] * 5, rel=1e-4)


def test_metrics_say_what_was_cut_and_masked() -> None:
    batch = batch_of_ratios(*RATIOS)

    def measured(correction: Correction) -> dict[str, float]:
        return {
            name: float(value) for name, value in correction_metrics(*batch.microbatches, batch, correction).items()
        }

    assert measured(settings(correction="icepop")) == pytest.approx(
        {
            "importance_mean": (0.5 + 1.5 + 1.25) / 5,
            "importance_max": 8.0,
            "importance_capped_share": 1 / 5,
            "importance_masked_share": 2 / 5,
        },
        rel=1e-5,
    )
    assert measured(settings(correction="sequence_mis")) == pytest.approx(
        {
            "importance_mean": 3 * 0.1875 / 5,
            "importance_max": 4.0,
            "importance_capped_share": 2 / 5,
            "importance_masked_share": 2 / 5,
        },
        rel=1e-5,
    )
    geometric = settings(correction="geometric", mask_low=0.5, mask_high=1.9)
    assert measured(geometric) == pytest.approx(
        {"importance_mean": 3 / 5, "importance_max": 8.0, "importance_masked_share": 2 / 5}, rel=1e-5
    )
    assert measured(settings(old_logprobs="engine")) == {}


def test_unknown_log_probs_weigh_one_and_are_never_masked() -> None:
    batch = pack([TrainingSequence([11, 12], [13, 14], 1.0, True)], PLAN)
    (microbatch,) = batch.microbatches
    microbatch.old_logprobs = torch.full((11,), -5.0)
    for preset in ("sequence_tis", "sequence_mis", "icepop", "geometric"):
        assert correction_weights(microbatch, settings(correction=preset)).tolist() == [1.0] * 11


@pytest.mark.parametrize("preset", ["sequence_tis", "sequence_mis", "icepop", "geometric"])
def test_micro_batches_change_no_weight(preset: str) -> None:
    """Sequences are whole within a micro-batch, wherever they are packed."""
    together, alone = batch_of_ratios(*RATIOS), []
    correction = settings(correction=preset, mask_veto=0.01)
    sequences = [
        TrainingSequence([21], [22, 23, 24], -1.0, False, [-2.0] * 3),  # type: ignore[arg-type]
        TrainingSequence([11, 12], [13, 14], 1.0, True, [-2.0] * 2),  # type: ignore[arg-type]
    ]
    old = {part: -2.0 + log(ratio) for part, ratio in zip((13, 14, 22, 23, 24), RATIOS, strict=True)}
    for microbatch in pack(sequences, PackingPlan(0, 1, 1)).microbatches:
        microbatch.old_logprobs = torch.tensor([old.get(int(label), 0.0) for label in microbatch.labels])
        alone += correction_weights(microbatch, correction)[microbatch.trained].tolist()
    expected = correction_weights(together.microbatches[0], correction)[POSITIONS].tolist()
    assert sorted(alone) == pytest.approx(sorted(expected))


def test_the_engines_log_probs_as_the_old_ones() -> None:
    """Ratios to the engine, where it is known; the mismatch still compares it with the trainer."""
    batch = batch_of_ratios(*RATIOS)
    (microbatch,) = batch.microbatches
    microbatch.engine_logprobs[2] = torch.nan
    logprobs = torch.full((11,), -1.0, requires_grad=True)
    terms = PolicyTerms(TokenOutputs(logprobs, torch.zeros(11)), microbatch, batch, settings(old_logprobs="engine"))
    assert microbatch.old_logprobs is not None
    ratio = terms.ratio[POSITIONS].tolist()
    assert ratio == pytest.approx([exp(1), exp(1) / 8, exp(1), exp(1), exp(1)], rel=1e-5)
    coefficients = torch.arange(11.0)
    assert torch.equal(terms.corrected(coefficients), coefficients)
    output = terms.output(terms.mean(logprobs), {})
    assert output.metrics["mismatch"].item() == pytest.approx(sum(abs(log(r)) for r in (0.5, 1.5, 1.25, 0.1)) / 5)
    assert "importance_mean" not in output.metrics


def sample(response: list[int], correct: bool) -> Sample:
    verdict = Verdict(float(correct), "correct" if correct else "incorrect", None)
    engine = [-1.0] * len(response)
    return Sample("", [1], response, "", engine, engine, "stop", 0, verdict)  # type: ignore[arg-type]


GROUP = Group(Prompt("", (Message("user", ""),), ""), [sample([10], True), sample([20], False)])
TABLE = {10: -1.0 + log(1.5), 20: -1.0 + log(0.9)}  # The ratios to the engine.


def test_outcome_clips_the_ratio_to_the_engine_in_its_only_update(table_model: Any) -> None:
    """1.5 is beyond 1.2, where a gain stops; 0.9 goes on, with its ratio."""
    policy = table_model("policy", TABLE)
    config = OutcomeConfig(name="outcome", std="none")
    metrics = Outcome(config, PLAN, 2, policy, correction=settings(old_logprobs="engine")).update([GROUP], 0)
    assert policy.gradients == [pytest.approx({20: 0.5 / 2 * 0.9}, rel=1e-5)]
    assert metrics["policy/clip_share"] == 0.5
    assert metrics["policy/mismatch"] == pytest.approx((log(1.5) - log(0.9)) / 2, rel=1e-5)


def test_ppo_needs_no_pass_of_the_old_policy_where_the_engine_is_it(table_model: Any) -> None:
    policy, critic = table_model("policy", TABLE), table_model("critic", {}, scores=True)
    config = PpoConfig(name="ppo", critic_minibatches=1, policy_epochs=2, whiten_advantages=False, clip_high=0.6)
    ppo = Ppo(config, PLAN, 0, policy, critic, None, settings(old_logprobs="engine"))
    metrics = ppo.update([GROUP], 0)
    assert len(policy.batches) == 2  # two updates
    assert policy.gradients == [pytest.approx({10: -1.5 / 2}, rel=1e-5)] * 2
    assert metrics["policy/ratio_max"] == pytest.approx(1.5, rel=1e-5)


def config(algorithm: dict[str, Any] | None = None, **rollout: Any) -> TrainConfig:
    sections = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rollout": rollout, "algorithm": algorithm or {}}
    return TrainConfig.model_validate({"run_dir": "r", "num_steps": 3} | sections)


def test_what_a_configuration_corrects() -> None:
    assert config().correction is None
    assert config(corrects="always").correction == Correction(importance_cap=2.0)
    stale = config(engine="sglang", staleness=1)
    assert stale.correction == Correction(importance_cap=2.0)
    assert config(engine="sglang", staleness=1, importance_cap=None).correction is None
    assert config(corrects="always", correction="icepop").correction == Correction(
        importance_cap=5.0, mask_level="token", mask_low=0.5, mask_high=5.0
    )
    assert config(corrects="always", correction="icepop", mask_high=8).rollout.importance_cap == 8
    assert config(corrects="always", old_logprobs="engine").correction == Correction(old_logprobs="engine")
    # Where each ratio is to the engine, a single update has something to clip.
    for algorithm in ({"name": "outcome", "clip_high": 0.28}, {"name": "ppo", "clip_low": 0.1}):
        assert not config(algorithm, corrects="always", old_logprobs="engine").has_fresh_ratios
        with pytest.raises(ValidationError, match=r"algorithm\.clip_\w+ has no meaning for a single update"):
            config(algorithm, corrects="always")


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"correction": "snis"}, "Input should be 'tis', 'sequence_tis'"),
        ({"mask_low": 1.5}, "less than or equal to 1"),
        ({"mask_high": 0.5}, "greater than or equal to 1"),
        ({"mask_veto": 0}, "greater than 0"),
        ({"importance_cap": 0}, "greater than 0"),
    ],
)
def test_settings_are_checked(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(corrects="always", **rollout)
