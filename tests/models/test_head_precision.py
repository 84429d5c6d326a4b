"""The head's FP8 values are measured on the run's own tokens, and given up where they are not good enough."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_oreal.checkpoint.families import read_architecture
from megatron_oreal.config import HeadPrecision, ModelConfig, ParallelConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels.fp8_gate import Fp8Gate
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.parallel import ParallelLayout
from megatron_oreal.models.trainable import TrainableModel
from tests.models.tiny import random_sequences, write_tiny_model


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=True)
    parallel.finalize()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("head"), tied=False, num_layers=2)


def build(path: Path, layout: ParallelLayout, precision: HeadPrecision) -> TrainableModel:
    architecture = read_architecture(path)
    head = LogprobHead(layout, architecture.vocab_size, precision=precision)
    model = TrainableModel("policy", architecture, head, ModelConfig(path=path, dtype="bfloat16"), layout)
    model.load_weights(path)
    return model


def logprobs(model: TrainableModel) -> torch.Tensor:
    plan = PackingPlan(data_rank=0, data_size=1, microbatch_tokens=64)
    batch = pack(random_sequences(6), plan)
    model.forward(batch, "old_logprobs")
    return torch.cat([microbatch.old_logprobs for microbatch in batch.microbatches])


def test_fp8_values_that_are_good_enough_are_kept(path: Path, layout: ParallelLayout) -> None:
    model = build(path, layout, "fp8")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        values = logprobs(model)
    assert model.head.guard.precision == "fp8"
    assert model.head.guard.report is not None and model.head.guard.report.passes
    torch.testing.assert_close(values, logprobs(build(path, layout, "bf16")), atol=0.05, rtol=0)


def test_fp8_values_that_are_not_fall_back_with_a_reason(path: Path, layout: ParallelLayout) -> None:
    model = build(path, layout, "fp8")
    model.head.guard.gate = Fp8Gate(max_mean_ratio=0.5)  # nothing passes
    with pytest.warns(UserWarning, match=r"model\.head_precision: fp8 log-probs failed on \d+ tokens .*: bf16"):
        values = logprobs(model)
    assert torch.equal(values, logprobs(build(path, layout, "bf16")))
