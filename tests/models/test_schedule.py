"""The learning rate over a run, whatever its steps leave out."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import cos, pi
from pathlib import Path

import pytest

from megatron_oreal.algorithms.losses import cross_entropy
from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=True)
    parallel.finalize()


def learning_rates(path: Path, layout: ParallelLayout, taken: list[int], planned: int, decay: str) -> list[float]:
    """The learning rate of each optimizer step, where the steps of the run take so many of `planned` ones."""
    architecture = read_architecture(path)
    head = LogprobHead(layout, architecture.vocab_size)
    optimizer = OptimizerConfig(lr=1e-2, min_lr=1e-3 if decay == "cosine" else 0.0, decay=decay)  # type: ignore[arg-type]
    training = TrainableConfig(optimizer=optimizer)
    num_updates = planned * len(taken)
    model = TrainableModel("policy", architecture, head, ModelConfig(path=path), layout, training, num_updates)
    model.load_weights(path)
    batch = pack(random_sequences(2), PackingPlan(data_rank=0, data_size=1, microbatch_tokens=64))
    rates = []
    for count in taken:
        for _ in range(count):
            rates.append(model.train_step(batch, partial(cross_entropy, batch=batch))["policy/lr"])
        model.complete_updates(planned)
    return rates


def test_a_cosine_ends_with_the_run_though_steps_were_skipped(tmp_path: Path, layout: ParallelLayout) -> None:
    path = write_tiny_model(tmp_path, tied=True, num_layers=1)
    curve = [1e-3 + 9e-3 * (1 + cos(pi * number / 8)) / 2 for number in range(1, 9)]
    assert learning_rates(path, layout, [2, 2, 2, 2], 2, "cosine") == pytest.approx(curve)
    # The second step is skipped, the third has one mini-batch only.
    expected = [curve[0], curve[1], curve[4], curve[6], curve[7]]
    assert learning_rates(path, layout, [2, 0, 1, 2], 2, "cosine") == pytest.approx(expected)
    assert learning_rates(path, layout, [0, 1, 0, 1], 1, "constant") == pytest.approx([1e-2, 1e-2])
