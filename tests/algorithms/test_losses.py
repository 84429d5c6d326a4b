from collections.abc import Callable
from math import exp, isfinite, log

import pytest
import torch

from megatron_oreal.algorithms.corrections import correction_metrics, correction_weights
from megatron_oreal.algorithms.losses import (
    PolicyTerms,
    bounded_exp,
    cross_entropy,
    engine_mismatch,
    kl_k3,
    kl_mse,
    outcome_cross_entropy,
    sequence_mean,
)
from megatron_oreal.algorithms.metrics import over_minibatches
from megatron_oreal.config import Correction
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import Batch, TokenOutputs, TrainingSequence

NAN = float("nan")
# Trained positions: 1 and 2 of the first, 0 to 2 of the second; then a filler of three tokens.
FIRST = TrainingSequence([11, 12], [13, 14], 1.0, True, [-0.25, -0.5])
SECOND = TrainingSequence([21], [22, 23, 24], -1.0, False, [-1.0, -2.0, -3.0])


def make_batch() -> Batch:
    return pack([FIRST, SECOND], PackingPlan(0, 1, microbatch_tokens=100, token_multiple=11))


def filler_batch() -> Batch:
    """That of a rank for which no sequence is left."""
    return pack([FIRST], PackingPlan(1, 2, microbatch_tokens=100))


def spread(values: list[float], outside: float = NAN) -> torch.Tensor:
    """The five trained tokens' values at their positions, [11]."""
    tokens = torch.full((11,), outside, dtype=torch.float64)
    tokens[torch.tensor([1, 2, 4, 5, 6])] = torch.tensor(values, dtype=torch.float64)
    return tokens


def test_divergences_by_hand() -> None:
    logprobs = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([-1.0, -1.0 + log(2), -3.0], dtype=torch.float64)
    assert kl_k3(logprobs, target).tolist() == pytest.approx([0.0, 1 - log(2), exp(-2) + 1], abs=1e-12)
    (gradient,) = torch.autograd.grad(kl_k3(logprobs, target).sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0.0, -1.0, 1 - exp(-2)], abs=1e-12)
    assert kl_mse(logprobs, target).tolist() == pytest.approx([0.0, log(2) ** 2 / 2, 2.0], abs=1e-12)
    (gradient,) = torch.autograd.grad(kl_mse(logprobs, target).sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0.0, -log(2), 2.0], abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_is_exp_up_to_e20_and_its_tangent_beyond(dtype: torch.dtype) -> None:
    usual = torch.tensor([-torch.inf, -100.0, -1.0, 0.0, 3.0, 20.0], dtype=dtype, requires_grad=True)
    assert torch.equal(bounded_exp(usual), usual.exp())
    (gradient,) = torch.autograd.grad(bounded_exp(usual).sum(), usual)
    assert torch.equal(gradient, usual.detach().exp())
    large = torch.tensor([21.0, 95.0, 1e4], dtype=dtype, requires_grad=True)
    assert bounded_exp(large).tolist() == pytest.approx([exp(20) * (1 + d - 20) for d in (21, 95, 1e4)], rel=1e-6)
    (gradient,) = torch.autograd.grad(bounded_exp(large).sum(), large)
    assert gradient.tolist() == pytest.approx([exp(20)] * 3, rel=1e-6)


def test_k3_of_a_token_that_the_policy_finds_impossible_is_finite() -> None:
    """The float32 exponential overflows beyond 88.7: d = 94.5 is the tangent, with its slope 1 - e^20."""
    logprobs = torch.tensor([-95.0, -1.0], requires_grad=True)
    divergence = kl_k3(logprobs, torch.tensor([-0.5, -1.5]))
    assert divergence.tolist() == pytest.approx([exp(20) * 75.5 - 95.5, exp(-0.5) - 0.5], rel=1e-6)
    (gradient,) = torch.autograd.grad(divergence.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([1 - exp(20), 1 - exp(-0.5)], rel=1e-6)


def test_k3_is_an_unbiased_estimate_of_the_divergence() -> None:
    policy, target = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.5, 0.1, 0.4]).double()
    divergence = (policy * (policy / target).log()).sum()
    torch.testing.assert_close((policy * kl_k3(policy.log(), target.log())).sum(), divergence)


def test_sequence_mean_reads_trained_tokens_only() -> None:
    (microbatch,) = make_batch().microbatches
    means = sequence_mean(spread([1.0, 4.0, 1.0, 2.0, -9.0]), microbatch)
    assert means.tolist() == [2.5, -2.0, 0.0]  # the filler's is 0


def test_outcome_cross_entropy_by_hand() -> None:
    """Means ln 3 with label 1 and ln 7 with label 0: ln(4/3) and ln 8, over four sequences of all ranks."""
    (microbatch,) = make_batch().microbatches
    scores = spread([log(3), log(3), 0.0, 3 * log(7), 0.0]).requires_grad_()
    output = outcome_cross_entropy(scores, microbatch, num_sequences=4)
    assert output.loss.item() == pytest.approx((log(4 / 3) + log(8)) / 4)
    assert {name: value.item() for name, value in output.metrics.items()} == {
        "loss": pytest.approx((log(4 / 3) + log(8)) / 4),
        "accuracy": 0.25,
    }
    (gradient,) = torch.autograd.grad(output.loss, scores)
    # (sigmoid - label) / length / 4
    torch.testing.assert_close(gradient, spread([-1 / 32] * 2 + [7 / 96] * 3, outside=0.0))


def test_zero_scores_cost_ln_2_whatever_the_filler() -> None:
    (microbatch,) = make_batch().microbatches
    output = outcome_cross_entropy(torch.zeros(11), microbatch, num_sequences=2)
    assert output.loss.item() == pytest.approx(log(2))
    (filler,) = filler_batch().microbatches
    assert outcome_cross_entropy(torch.zeros(2), filler, num_sequences=2).loss.item() == 0


def test_cross_entropy_by_hand() -> None:
    batch = make_batch()
    (microbatch,) = batch.microbatches
    logprobs = spread([-1.0, -2.0, -0.5, -1.5, -5.0], outside=0.0).requires_grad_()
    output = cross_entropy(TokenOutputs(logprobs, spread([1.0, 2.0, 3.0, 4.0, 5.0], outside=0.0)), microbatch, batch)
    assert output.loss.item() == pytest.approx(10 / 5)
    assert {name: value.item() for name, value in output.metrics.items()} == {"loss": 2.0, "entropy": 3.0}
    (gradient,) = torch.autograd.grad(output.loss, logprobs)
    torch.testing.assert_close(gradient, spread([-0.2] * 5, outside=0.0))


def values(metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in metrics.items()}


def test_engine_mismatch_by_hand() -> None:
    """d = 0, -ln 2, ln 2, 0, 0."""
    batch = make_batch()
    (microbatch,) = batch.microbatches
    microbatch.old_logprobs = spread([-0.25, -0.5 - log(2), -1.0 + log(2), -2.0, -3.0])
    assert values(engine_mismatch(microbatch, batch)) == pytest.approx(
        {
            "mismatch": 2 * log(2) / 5,
            "mismatch_max": log(2),
            "mismatch_ratio": (3 + 2 + 2) / 5,
            "mismatch_kl_k1": 0.0,
            "mismatch_kl_k3": (0.5 + 2 - 2) / 5,
        },
        abs=1e-7,
    )


def test_a_token_that_the_trainer_finds_impossible_keeps_metrics_finite() -> None:
    batch = make_batch()
    (microbatch,) = batch.microbatches
    microbatch.old_logprobs = spread([-200.0, -0.5, -1.0, -2.0, -3.0])
    metrics = values(engine_mismatch(microbatch, batch) | correction_metrics(microbatch, batch, Correction(2.0)))
    assert all(map(isfinite, metrics.values()))
    assert metrics["mismatch_max"] == 20.0


@pytest.mark.parametrize("measure", [engine_mismatch, lambda *batch: correction_metrics(*batch, Correction(2.0))])
def test_a_rank_with_only_filler_mismatches_nowhere(measure: Callable[..., dict[str, torch.Tensor]]) -> None:
    batch = filler_batch()
    (microbatch,) = batch.microbatches
    microbatch.old_logprobs = torch.full((2,), NAN)
    assert set(values(measure(microbatch, batch)).values()) == {0.0}


def test_importance_weights_by_hand() -> None:
    """Ratios 1/2, 1, 2, 4, 8 to the engine's log-probs, cut at 3."""
    batch = make_batch()
    (microbatch,) = batch.microbatches
    engine = [-0.25, -0.5, -1.0, -2.0, -3.0]
    microbatch.old_logprobs = spread([engine[i] + (i - 1) * log(2) for i in range(5)])
    weights = correction_weights(microbatch, Correction(3.0))
    torch.testing.assert_close(weights.double(), spread([0.5, 1.0, 2.0, 3.0, 3.0], outside=1.0))
    assert values(correction_metrics(microbatch, batch, Correction(3.0))) == pytest.approx(
        {"importance_mean": 9.5 / 5, "importance_max": 8.0, "importance_capped_share": 2 / 5}
    )


def test_tokens_of_unknown_log_prob_weigh_one() -> None:
    batch = pack([TrainingSequence([11, 12], [13, 14], 1.0, True)], PackingPlan(0, 1, microbatch_tokens=100))
    (microbatch,) = batch.microbatches
    microbatch.old_logprobs = torch.tensor([0.0, -5.0, -6.0, 0.0])
    assert correction_weights(microbatch, Correction(2.0)).tolist() == [1.0] * 4
    assert values(engine_mismatch(microbatch, batch))["mismatch"] == 0.0


def test_the_terms_of_a_policy_loss_by_hand() -> None:
    batch = make_batch()
    (microbatch,) = batch.microbatches
    logprobs = spread([-1.0, -2.0, -0.5, -1.5, -5.0], outside=0.0).requires_grad_()
    outputs = TokenOutputs(logprobs, spread([1.0, 2.0, 3.0, 4.0, 5.0], outside=0.0))
    microbatch.old_logprobs = spread([-1.0 - log(2), -2.0, -0.5, -1.5, -5.0], outside=0.0)
    terms = PolicyTerms(outputs, microbatch, batch, correction=Correction(importance_cap=1.5))
    assert terms.old_logprobs is microbatch.old_logprobs
    assert terms.mean(spread([1.0, 2.0, 3.0, 4.0, 10.0])).item() == 4.0
    assert terms.kl("mse", microbatch.old_logprobs).item() == pytest.approx(log(2) ** 2 / 2 / 5)
    assert terms.entropy().item() == 3.0
    # The engine's log-probs are -0.25, -0.5, -1, -2, -3: ratios exp(-0.75)/2, exp(-1.5), exp(0.5), exp(0.5), exp(-2).
    weights = spread([exp(-0.75) / 2, exp(-1.5), 1.5, 1.5, exp(-2)], outside=1.0).float()
    torch.testing.assert_close(terms.corrected(torch.full((11,), 2.0)), 2 * weights)
    output = terms.output(terms.mean(logprobs), {"mine": logprobs.sum()})
    assert output.loss.requires_grad and not any(value.requires_grad for value in output.metrics.values())
    assert {"mine", "loss", "mismatch", "mismatch_max", "importance_mean"} <= output.metrics.keys()
    on_policy = PolicyTerms(outputs, microbatch, batch, None)
    coefficients = torch.ones(11)
    assert on_policy.corrected(coefficients) is coefficients
    assert "importance_mean" not in on_policy.output(terms.mean(logprobs), {}).metrics


def test_a_first_pass_that_keeps_nothing_is_its_own_old_policy_and_writes_nothing() -> None:
    batch = make_batch()
    (microbatch,) = batch.microbatches
    logprobs = spread([-1.0, -2.0, -0.5, -1.5, -5.0], outside=0.0).requires_grad_()
    terms = PolicyTerms(TokenOutputs(logprobs, logprobs.detach()), microbatch, batch, None)
    assert torch.equal(terms.old_logprobs, logprobs.detach()) and not terms.old_logprobs.requires_grad
    assert terms.output(terms.mean(logprobs), {}).metrics["mismatch"].item() == pytest.approx(5.25 / 5)
    assert microbatch.old_logprobs is None


def test_metrics_of_mini_batches_are_means_but_maxima_and_the_last_learning_rate() -> None:
    updates = [
        {"policy/kl": 1.0, "policy/ratio_max": 5.0, "policy/lr": 2.0},
        {"policy/kl": 2.0, "policy/ratio_max": 3.0, "policy/lr": 1.0},
    ]
    assert over_minibatches(updates) == {"policy/kl": 1.5, "policy/ratio_max": 5.0, "policy/lr": 1.0}
    assert over_minibatches([]) == {}
