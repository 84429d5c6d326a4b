"""What is trained is the distribution that was sampled: where every answer is right, nothing is left to learn.

Expectations are exact: every answer of a bandit is enumerated and weighed with its probability at the temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_oreal.algorithms.model import Loss
from megatron_oreal.algorithms.oreal import Oreal, fill_coefficients
from megatron_oreal.algorithms.outcome import Outcome
from megatron_oreal.algorithms.ppo import Ppo
from megatron_oreal.config import OrealConfig, OutcomeConfig, ParallelConfig, PpoConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead, Truncation
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import (
    Batch,
    Group,
    Message,
    Microbatch,
    Prompt,
    Sample,
    TokenOutputs,
    TokenStream,
    TrainingSequence,
    Verdict,
)

LOGITS = (2.0, 1.5, 1.0, 0.5, 0.0, -0.5)
GROUP_SIZE = 4


class Bandit:
    """A Model whose only state is empty, and whose logits are its parameters; the real head computes its log-probs."""

    def __init__(self, head: LogprobHead) -> None:
        self.head = head
        self.weight = torch.tensor(LOGITS)[:, None].requires_grad_()  # The logits: hidden is 1.

    def outputs(self, microbatch: Microbatch) -> TokenOutputs:
        layer = SimpleNamespace(weight=self.weight)
        model = SimpleNamespace(share_embeddings_and_output_weights=False, output_layer=layer)
        return self.head(model, torch.ones(len(microbatch.labels), 1, 1), microbatch)

    def forward(self, batch: Batch, stream: TokenStream) -> None:
        for microbatch in batch.microbatches:
            setattr(microbatch, stream, self.outputs(microbatch).values.detach())

    def train_step(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        for microbatch in batch.microbatches:
            outputs = self.outputs(microbatch)
            if keep is not None:
                setattr(microbatch, keep, outputs.values.detach())
            loss(outputs, microbatch).loss.backward()  # type: ignore[no-untyped-call]
        return {}

    def measure(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        return {}

    def sum_over_data(self, values: Tensor) -> Tensor:
        return values


class Zeros(Bandit):
    """A critic that knows nothing and learns nothing."""

    def __init__(self) -> None:
        pass

    def forward(self, batch: Batch, stream: TokenStream) -> None:
        for microbatch in batch.microbatches:
            setattr(microbatch, stream, torch.zeros(len(microbatch.labels)))

    def train_step(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        return {}


def solved(answer: int) -> Group:
    """A group of one answer, drawn every time: by linearity, its gradient is that of each of its samples."""
    verdict = Verdict(1.0, "correct", None)
    sample = Sample("p", [0], [answer], "", [], [], "stop", 0, verdict)  # type: ignore[arg-type]
    return Group(Prompt("p", (Message("user", "x"),), "1"), [sample] * GROUP_SIZE)


PLAN = PackingPlan(0, 1, 1000)


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=True)
    parallel.finalize()


def expected_gradient(
    layout: ParallelLayout, sampled_at: float, trained_at: float, learn: Callable[[Bandit, int], None]
) -> Tensor:
    """The gradient of the logits, in expectation over an answer that is drawn at the temperature `sampled_at`."""
    total = torch.zeros(len(LOGITS))
    for answer, probability in enumerate((torch.tensor(LOGITS) / sampled_at).softmax(0)):
        bandit = Bandit(LogprobHead(layout, len(LOGITS), precision="fp32", temperature=trained_at))
        learn(bandit, answer)
        if bandit.weight.grad is not None:
            total += probability * bandit.weight.grad[:, 0]
    return total


def with_objective(config: OutcomeConfig) -> Callable[[Bandit, int], None]:
    def learn(bandit: Bandit, answer: int) -> None:
        reference = Bandit(bandit.head) if config.kl_coef else None
        Outcome(config, PLAN, GROUP_SIZE, bandit, reference).update([solved(answer)], 0)

    return learn


def with_ppo(bandit: Bandit, answer: int) -> None:
    config = PpoConfig(name="ppo", whiten_advantages=False, critic_minibatches=1)
    Ppo(config, PLAN, 0, bandit, Zeros(), None).update([solved(answer)], 0)


def with_cloning(bandit: Bandit, answer: int) -> None:
    """OREAL's loss of correct samples; its own selection would leave out prompts that are always solved."""
    oreal = Oreal(OrealConfig(kl_coef=0.0), PLAN, 0, bandit, None, None)
    batch = pack([TrainingSequence([0], [answer], 1.0, True)] * GROUP_SIZE, PLAN)
    for microbatch in batch.microbatches:
        fill_coefficients(microbatch, batch, oreal.config)
    bandit.train_step(batch, partial(oreal.policy_loss, batch=batch), keep="old_logprobs")


OBJECTIVES = {
    **{
        name: with_objective(OutcomeConfig(name="outcome", objective=name))  # type: ignore[arg-type]
        for name in ("reinforce", "rloo", "rejection_sampling", "pure_rejection_sampling", "grpo", "pass_at_n", "logit")
    },
    "expression": with_objective(OutcomeConfig(name="outcome", objective="expression", h="t*t", baseline="none")),
    "gspo": with_objective(OutcomeConfig(name="outcome", objective="reinforce", ratio="sequence")),
    "reinforce with KL": with_objective(OutcomeConfig(name="outcome", objective="reinforce", kl_coef=0.5)),
    "ppo": with_ppo,
    "oreal": with_cloning,
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_where_every_answer_is_right_nothing_is_learnt(
    layout: ParallelLayout, objective: str, temperature: float
) -> None:
    gradient = expected_gradient(layout, temperature, temperature, OBJECTIVES[objective])
    assert gradient.tolist() == pytest.approx([0.0] * len(LOGITS), abs=1e-6)


@pytest.mark.parametrize("objective", ["reinforce", "ppo", "oreal"])
def test_the_log_probs_of_another_temperature_would_sharpen_the_policy(layout: ParallelLayout, objective: str) -> None:
    """The gradient of log-probs at temperature 1, of samples at 0.5, is the difference of the two distributions."""
    gradient = expected_gradient(layout, 0.5, 1.0, OBJECTIVES[objective])
    logits = torch.tensor(LOGITS)
    assert gradient.tolist() == pytest.approx((logits.softmax(0) - (logits / 0.5).softmax(0)).tolist(), abs=1e-6)


# Of LOGITS, in falling order: top_p 0.7 keeps three at temperature 1 and two at 0.5.
TRUNCATIONS = [Truncation(0, 0.7), Truncation(3, 1.0), Truncation(4, 0.8), Truncation(1, 1.0)]


def truncated_gradient(
    layout: ParallelLayout, temperature: float, truncation: Truncation, applied: bool, objective: str
) -> Tensor:
    """The expectation over what the local engine's truncation leaves; `applied`: the head is within it too."""
    total = torch.zeros(len(LOGITS))
    for answer, probability in enumerate(truncation(torch.tensor([LOGITS]) / temperature)[0].softmax(0)):
        if probability > 0:
            head = LogprobHead(layout, len(LOGITS), precision="fp32", temperature=temperature)
            bandit = Bandit(replace(head, truncation=truncation) if applied else head)
            OBJECTIVES[objective](bandit, answer)
            if bandit.weight.grad is not None:
                total += probability * bandit.weight.grad[:, 0]
    return total


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_nothing_is_learnt_either_from_truncated_samples(
    layout: ParallelLayout, objective: str, temperature: float, truncation: Truncation
) -> None:
    gradient = truncated_gradient(layout, temperature, truncation, True, objective)
    assert gradient.tolist() == pytest.approx([0.0] * len(LOGITS), abs=1e-6)


@pytest.mark.parametrize("objective", ["reinforce", "ppo", "oreal"])
def test_log_probs_among_all_tokens_would_sharpen_the_policy(layout: ParallelLayout, objective: str) -> None:
    """What `rollout.loss_support=all` approximates: the gradient is the difference of the two distributions."""
    gradient = truncated_gradient(layout, 1.0, TRUNCATIONS[0], False, objective)
    logits = torch.tensor(LOGITS)
    kept = TRUNCATIONS[0](logits[None])[0].softmax(0)
    assert gradient.tolist() == pytest.approx((logits.softmax(0) - kept).tolist(), abs=1e-6)


def test_later_updates_keep_the_tokens_of_the_first(layout: ParallelLayout) -> None:
    """The kept tokens are those of the policy that sampled, however far the weights have moved."""
    (microbatch,) = pack([TrainingSequence([0], [1], 1.0, True)], PLAN).microbatches
    head = LogprobHead(layout, len(LOGITS), precision="fp32", truncation=Truncation(2, 1.0))
    first = Bandit(head).outputs(microbatch).values[0].item()
    assert first == pytest.approx(torch.tensor([2.0, 1.5]).log_softmax(0)[1].item(), abs=1e-6)
    moved = Bandit(head)
    moved.weight.data[:, 0] = torch.tensor([0.0, 1.0, 9.0, 9.0, 9.0, 9.0])
    later = moved.outputs(microbatch).values[0].item()
    assert later == pytest.approx(torch.tensor([0.0, 1.0]).log_softmax(0)[1].item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_and_entropy_are_those_of_the_temperature(layout: ParallelLayout, temperature: float) -> None:
    (microbatch,) = pack([TrainingSequence([0], [3, 1], 1.0, True)], PLAN).microbatches
    outputs = Bandit(LogprobHead(layout, len(LOGITS), precision="fp32", temperature=temperature)).outputs(microbatch)
    logprobs = (torch.tensor(LOGITS) / temperature).log_softmax(0)
    assert outputs.values.tolist() == pytest.approx([logprobs[3].item(), logprobs[1].item(), 0.0], abs=1e-6)
    entropy = -(logprobs.exp() * logprobs).sum().item()
    assert outputs.entropy is not None and outputs.entropy.tolist() == pytest.approx([entropy, entropy, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("known", "expected"), [("model", [-0.25, -0.5]), ("rollout", [-0.1, -0.2]), ("unknown", [float("nan")] * 2)]
)
def test_losses_compare_with_the_engines_log_probs_of_the_trained_distribution(
    known: str, expected: list[float]
) -> None:
    sequence = TrainingSequence([0], [3, 1], 1.0, True, [-0.25, -0.5], [-0.1, -0.2])  # type: ignore[arg-type]
    plan = PackingPlan(0, 1, 1000, engine_logprobs=known)  # type: ignore[arg-type]
    (microbatch,) = pack([sequence], plan).microbatches
    assert microbatch.engine_logprobs[:2].tolist() == pytest.approx(expected, nan_ok=True)
