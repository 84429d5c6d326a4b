"""The head's FP8 values are measured on the run's own tokens, and given up where they are not good enough."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_oreal.config import HeadFp8, HeadPrecision, ModelConfig, ParallelConfig, RunConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.fp8.gate import Fp8Gate
from megatron_oreal.kernels.fp8.scaled import Fp8Options, Scaling
from megatron_oreal.kernels.precision import make_fp8_gemms
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.run.algorithms import ModelBuilder
from megatron_oreal.types import TrainingSequence
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model

SCALINGS: dict[HeadFp8, Scaling] = {"torch_row": "row", "torch_tensor": "tensor"}


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


def test_the_configured_scales_reach_the_products(path: Path, layout: ParallelLayout) -> None:
    """Scales of a tensor and of a row give different log-probs; each are those of the products themselves."""
    architecture = read_architecture(path)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 32, generator=generator).bfloat16()
    weight = torch.randn(architecture.vocab_size, 32, generator=generator).bfloat16()
    model = SimpleNamespace(share_embeddings_and_output_weights=False, output_layer=SimpleNamespace(weight=weight))
    found = []
    for head_fp8, scaling in SCALINGS.items():
        config = ModelConfig(path=path, dtype="bfloat16", head_precision="fp8", head_fp8=head_fp8)
        run = RunConfig(run_dir=path, num_steps=1, model=config)
        head = ModelBuilder(run, layout, architecture).logprob_head
        head.guard.gate = Fp8Gate(1e9, 1e9, 1e9, 1.0)
        sequences = [TrainingSequence([1], [number] * 11, 1.0, True) for number in (2, 3)]
        (microbatch,) = pack(sequences, PackingPlan(0, 1, microbatch_tokens=24)).microbatches
        labels = microbatch.labels[microbatch.loss_mask]
        gemms = make_fp8_gemms(hidden.device, hidden.dtype, with_values=True, options=Fp8Options("torch", scaling))
        wanted = linear_logprob(hidden[microbatch.loss_mask], weight, labels, precision=gemms)[0]
        found.append(head(model, hidden[:, None], microbatch).values[microbatch.loss_mask])
        assert torch.equal(found[-1], wanted)
    assert not torch.equal(*found)


@pytest.mark.parametrize("head_fp8", ["transformer_engine_tensor", "transformer_engine_block", "transformer_engine_mx"])
def test_what_transformer_engine_lacks_is_named_before_the_first_batch(
    head_fp8: HeadFp8, layout: ParallelLayout
) -> None:
    with pytest.raises(ValueError, match="scales through Transformer Engine needs an NVIDIA GPU") as raised:
        LogprobHead(layout, 53, precision="fp8_grad", fp8=head_fp8)
    assert "\n" not in str(raised.value)
