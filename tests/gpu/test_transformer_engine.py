"""Transformer Engine's layers beside the torch layers of the same model, on packed sequences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import pack
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences
from tests.support.workers.layouts_worker import gradient_stream, plan_of, weighted_loss
from tools.gpu.random_model import ModelShape, write_model

pytestmark = pytest.mark.gpu
SHAPE = ModelShape(hidden=256, intermediate=512, layers=2, heads=4, key_heads=2, vocabulary=512)
SEQUENCES = random_sequences(24, longest=100)


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    pytest.importorskip("transformer_engine.pytorch")
    yield parallel.initialize(ParallelConfig(), seed=0)
    parallel.finalize()


def build(path: Path, layout: ParallelLayout, **options: object) -> TrainableModel:
    architecture = read_architecture(path)
    training = TrainableConfig(optimizer=OptimizerConfig(lr=1e-3))
    head = LogprobHead(layout, architecture.vocab_size)
    config = ModelConfig(path=path, **options)  # type: ignore[arg-type]
    model = TrainableModel("model", architecture, head, config, layout, training)
    model.load_weights(path)
    return model


def results(model: TrainableModel) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Log-probs of all trained tokens, gradients and weights under their Hugging Face names."""
    batch = pack(SEQUENCES, plan_of(model.layout, microbatch_tokens=700))
    model.forward(batch, "old_logprobs")
    logprobs = torch.cat([each.old_logprobs[each.loss_mask] for each in batch.microbatches])  # type: ignore[index]
    model.accumulate_gradients(batch, weighted_loss)
    gradients = {name: tensor.float().clone() for name, tensor in gradient_stream(model)}
    return logprobs, gradients, {name: tensor.clone() for name, tensor in model.weight_stream()}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_layers_agree_with_torch_layers(layout: ParallelLayout, tmp_path: Path, recompute: str) -> None:
    """Both in bfloat16, beside float32: Transformer Engine may be wrong by little more than torch is."""
    path = tmp_path / "model"
    write_model(SHAPE, path, torch.device("cuda"), torch.bfloat16)
    exact = results(build(path, layout, implementation="local", dtype="float32"))
    ours = results(build(path, layout, implementation="local", dtype="bfloat16", recompute=recompute))
    engine_model = build(path, layout, implementation="transformer_engine", dtype="bfloat16", recompute=recompute)
    assert engine_model.transformer_engine
    engine = results(engine_model)
    assert (engine[0] - exact[0]).abs().max() <= 2 * (ours[0] - exact[0]).abs().max() + 1e-2
    assert set(engine[1]) == set(exact[1])  # fused layers give theirs in another order
    for name, wanted in exact[1].items():
        allowed = 2 * relative_error(ours[1][name], wanted) + 1e-2
        assert relative_error(engine[1][name], wanted) <= allowed, name
    for name, weight in ours[2].items():
        assert torch.equal(engine[2][name], weight), name


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "delayed"])
def test_fp8_layers_learn_as_bfloat16_does(layout: ParallelLayout, tmp_path: Path, recipe: str) -> None:
    """Eight steps on the same sequences: FP8 layers lower the loss at least 0.8 times as far."""
    path = tmp_path / "model"
    write_model(SHAPE, path, torch.device("cuda"), torch.bfloat16)
    lowered = []
    for fp8 in (None, recipe):
        model = build(path, layout, implementation="transformer_engine", dtype="bfloat16", fp8=fp8)
        # FP8 products take tokens in multiples of 16.
        batch = pack(SEQUENCES, replace(plan_of(layout, microbatch_tokens=700), token_multiple=16))
        losses = [model.train_step(batch, weighted_loss)["model/loss"] for _ in range(8)]
        lowered.append(losses[0] - losses[-1])
    assert lowered[0] > 0
    assert lowered[1] >= 0.8 * lowered[0], lowered
