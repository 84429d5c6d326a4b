"""A model that went to the host and came back is the same, and learns the same."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_oreal.algorithms.losses import cross_entropy
from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.offload import DeviceMemory, storages
from megatron_oreal.models.trainable import TrainableModel, dropped_tensors, kept_tensors
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=True)
    parallel.finalize()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("offload"), tied=True, num_layers=2)


def build(path: Path, layout: ParallelLayout, dtype: str, sharded: bool) -> TrainableModel:
    architecture = read_architecture(path)
    training = TrainableConfig(optimizer=OptimizerConfig(lr=1e-2, distributed=sharded))
    model = TrainableModel(
        "policy",
        architecture,
        LogprobHead(layout, architecture.vocab_size),
        ModelConfig(path=path, dtype=dtype),
        layout,
        training,
    )
    model.load_weights(path)
    return model


def learn(model: TrainableModel, seed: int) -> dict[str, float]:
    plan = PackingPlan(data_rank=0, data_size=1, microbatch_tokens=64)
    batch = pack(random_sequences(6, seed), plan)
    return model.train_step(batch, partial(cross_entropy, batch=batch))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_offloaded_model_comes_back_whole(path: Path, layout: ParallelLayout, dtype: str, sharded: bool) -> None:
    stays, moves = (build(path, layout, dtype, sharded) for _ in range(2))
    for step in range(3):  # the optimizer has no state before the first
        num_bytes = moves.offload()
        assert not storages([*kept_tensors(moves), *dropped_tensors(moves)]), "memory was kept"
        assert num_bytes >= 2 * sum(parameter.nbytes for _, parameter in stays.parameters())
        moves.restore()
        assert learn(moves, step) == learn(stays, step)
    for (name, ours), (_, theirs) in zip(moves.parameters(), stays.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_frozen_model_comes_back_whole(path: Path, layout: ParallelLayout) -> None:
    architecture = read_architecture(path)
    head = LogprobHead(layout, architecture.vocab_size)
    model = TrainableModel("reference", architecture, head, ModelConfig(path=path), layout)
    model.load_weights(path)
    before = [parameter.clone() for _, parameter in model.parameters()]
    model.offload()
    model.restore()
    assert all(torch.equal(old, new) for old, (_, new) in zip(before, model.parameters(), strict=True))


def test_views_stay_views_and_what_is_dropped_comes_back_as_zeros() -> None:
    whole, dropped, memory = torch.arange(6.0), torch.ones(3), DeviceMemory()
    view = whole[2:4]
    assert memory.offload([view, whole], [dropped]) == 4 * 9
    memory.restore()
    assert view.tolist() == [2.0, 3.0] and dropped.tolist() == [0.0, 0.0, 0.0]
    whole[2] = 7.0
    assert view[0] == 7.0
    memory.offload([whole], [])  # the host copy is used again, with the new values
    memory.restore()
    assert whole.tolist() == [0.0, 1.0, 7.0, 3.0, 4.0, 5.0]
