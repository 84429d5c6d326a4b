"""Optimizer steps against torch.optim.AdamW, learning rates against their formulas, scores against transformers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models import optimizer, parallel
from megatron_oreal.models.heads import LogprobHead, ScalarHead
from megatron_oreal.models.optimizer import build_schedule, moment_settings
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model

SEQUENCES = random_sequences(5)
DENOMINATOR = 10  # so small that the gradient's norm is above the bound of the tests that clip
# Each is far from its default and from the others, so that a swapped one shows.
SETTINGS: dict[str, Any] = {
    "lr": 3e-3,
    "min_lr": 1e-3,
    "weight_decay": 0.5,
    "beta1": 0.6,
    "beta2": 0.8,
    "eps": 1e-3,
    "clip_grad": 0.25,
    "warmup_steps": 2,
    "decay": "linear",
}
NUM_UPDATES = 4
RATES = [1.5e-3, 3e-3, 2e-3, 1e-3]  # half of the way up, all of it, then down to min_lr in two steps


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=True)
    parallel.finalize()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("optimizer"), tied=False, num_layers=2)


def weighted_loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
    loss = -(outputs.values * microbatch.advantages)[microbatch.loss_mask].sum() / DENOMINATOR
    return LossOutput(loss, {"loss": loss.detach()})


def transformers_loss(model: Qwen2ForCausalLM) -> Tensor:
    loss = torch.zeros(())
    for sequence in SEQUENCES:
        logits = model(torch.tensor(sequence.token_ids)[None]).logits[0, len(sequence.prompt_ids) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(sequence.response_ids).long()[:, None])
        loss = loss - sequence.advantage * chosen.sum() / DENOMINATOR
    return loss


def trained(path: Path, layout: ParallelLayout, dtype: str = "float32", **changes: Any) -> TrainableModel:
    architecture = read_architecture(path)
    head = LogprobHead(layout, architecture.vocab_size)
    training = TrainableConfig(optimizer=OptimizerConfig(**SETTINGS | changes))
    model_config = ModelConfig(path=path, dtype=dtype)  # type: ignore[arg-type]
    model = TrainableModel("policy", architecture, head, model_config, layout, training, NUM_UPDATES)
    model.load_weights(path)
    return model


def batch_of(layout: ParallelLayout) -> Batch:
    return pack(SEQUENCES, PackingPlan(data_rank=0, data_size=1, microbatch_tokens=40, device=layout.device))


def reference_steps(path: Path, clip_grad: float) -> tuple[list[float], dict[str, Tensor]]:
    """The norms of the gradients before they are clipped, and the weights after the steps, by torch alone."""
    model = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() == 1]  # biases and norms
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}],
        betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
        eps=SETTINGS["eps"],
    )
    norms = []
    for rate in RATES:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        transformers_loss(model).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad or math.inf)))
        optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("clip_grad", [0.25, 0.0], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("distributed", [False, True])
def test_steps_are_those_of_adamw(path: Path, layout: ParallelLayout, clip_grad: float, distributed: bool) -> None:
    norms, expected = reference_steps(path, clip_grad)
    assert min(norms) > 4 * SETTINGS["clip_grad"]
    before = Qwen2ForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    model = trained(path, layout, clip_grad=clip_grad, distributed=distributed, overlap_grad_reduce=distributed)
    batch = batch_of(layout)
    assert len(batch.microbatches) > 1
    metrics = [model.train_step(batch, weighted_loss) for _ in RATES]
    assert [step["policy/lr"] for step in metrics] == pytest.approx(RATES)
    assert [step["policy/grad_norm"] for step in metrics] == pytest.approx(norms, rel=1e-4)
    weights = dict(model.weight_stream())
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        moved = float((expected[name] - before[name]).norm())
        assert float((weight - expected[name]).norm()) < 2e-3 * moved, name


def test_bfloat16_keeps_float32_masters_and_resumes_from_them(path: Path, layout: ParallelLayout) -> None:
    """Steps that are too small for bfloat16 add up in the masters; a resumed optimizer goes on with the same ones."""
    settings = {"lr": 2e-4, "min_lr": 0.0, "warmup_steps": 0, "decay": "cosine", "distributed": False}
    batch = batch_of(layout)
    unbroken = trained(path, layout, "bfloat16", **settings)
    assert all(parameter.dtype is torch.bfloat16 for _, parameter in unbroken.parameters())
    assert all(parameter.main_grad.dtype is torch.float32 for _, parameter in unbroken.parameters())  # type: ignore[attr-defined]
    for _ in range(2):
        unbroken.train_step(batch, weighted_loss)
    file = io.BytesIO()
    torch.save(unbroken.training_state(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    parameters = [(name, parameter.detach().clone()) for name, parameter in unbroken.parameters()]
    assert any(not torch.equal(master, master.bfloat16().float()) for master in state["masters"][0])

    resumed = trained(path, layout, "bfloat16", **settings)
    with torch.no_grad():
        for (_, parameter), (_, saved) in zip(resumed.parameters(), parameters, strict=True):
            parameter.copy_(saved)
    resumed.load_training_state(state)
    for _ in range(2):
        assert resumed.train_step(batch, weighted_loss) == unbroken.train_step(batch, weighted_loss)
    assert resumed.training_state()["num_updates"] == 4
    masters = [model.training_state()["masters"][0] for model in (resumed, unbroken)]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*masters, strict=True))
    for (name, ours), (_, theirs) in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def rate(step: int, lr: float, min_lr: float, warmup: int, decay_steps: int, decay: str) -> float:
    """The learning rate of optimizer step `step`, counted from 1."""
    if step <= warmup:
        return lr * step / warmup
    if decay == "constant":
        return lr
    if step > decay_steps:
        return min_lr
    done = (step - warmup) / (decay_steps - warmup)
    share = 1 - done if decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min_lr + share * (lr - min_lr)


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
@pytest.mark.parametrize("decay_steps", [None, 5, 8, 2])
def test_schedules_are_their_formulas(decay: Any, warmup: int, decay_steps: int | None) -> None:
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=9.0)
    settings = OptimizerConfig(lr=0.7, min_lr=0.1, warmup_steps=warmup, decay_steps=decay_steps, decay=decay)
    schedule = build_schedule(optimizer, settings, num_updates=7)
    last = max(decay_steps or 7, warmup + 1)
    for step in range(1, 10):
        schedule.step(1)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(step, 0.7, 0.1, warmup, last, decay)), step
        assert optimizer.param_groups[0]["weight_decay"] == settings.weight_decay


def test_scores_are_those_of_a_sequence_classifier(tmp_path: Path, layout: ParallelLayout) -> None:
    """transformers shows the score of one token; the scores of all tokens are its `score` of the hidden states."""
    path = write_tiny_model(
        tmp_path, tied=False, num_layers=2, model_class=Qwen2ForSequenceClassification, num_labels=1, pad_token_id=0
    )
    classifier = Qwen2ForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    architecture = read_architecture(path)
    model = TrainableModel("critic", architecture, ScalarHead(layout), ModelConfig(path=path, dtype="float32"), layout)
    model.load_weights(path)
    batch = batch_of(layout)
    model.forward(batch, "values")
    num_checked = 0
    for microbatch in batch.microbatches:
        assert microbatch.values is not None
        for number in range(microbatch.num_sequences):
            mine = microbatch.sequence_ids == number
            ids = microbatch.input_ids[mine][None]
            with torch.no_grad():
                scores = classifier.score(classifier.model(ids).last_hidden_state)[0, :, 0]
                assert torch.equal(scores[-1], classifier(ids).logits[0, 0]) or 0 in ids  # 0: padding
            assert scores.abs().max() > 0.01
            torch.testing.assert_close(microbatch.values[mine], scores, atol=1e-5, rtol=1e-4)
            num_checked += 1
    assert num_checked >= len(SEQUENCES)


def test_bfloat16_moments_are_megatrons_precision_aware_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = OptimizerConfig(lr=1e-3, moments="bfloat16", distributed=True)
    monkeypatch.setattr(optimizer, "HAVE_TE", True)
    assert moment_settings(settings, is_sharded=True) == {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    }
    assert moment_settings(OptimizerConfig(lr=1e-3), is_sharded=True) == {}
    with pytest.raises(ValueError, match=r"optimizer\.distributed=true"):
        moment_settings(settings, is_sharded=False)
