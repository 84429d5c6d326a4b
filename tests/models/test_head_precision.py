"""The head computes with the configured precision; what that lacks on this machine is named at the start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_oreal.config import HeadFp8, HeadPrecision, ModelConfig, ParallelConfig, RunConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels import linear_logprob
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.run.algorithms import ModelBuilder
from megatron_oreal.types import TrainingSequence
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model

PRECISIONS: tuple[HeadPrecision, HeadPrecision] = ("bf16", "fp8_grad")


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


def test_fp8_gradients_leave_the_log_probs_as_they_are(path: Path, layout: ParallelLayout) -> None:
    assert torch.equal(logprobs(build(path, layout, "fp8_grad")), logprobs(build(path, layout, "bf16")))


def test_the_configured_precision_reaches_the_gradients(path: Path, layout: ParallelLayout) -> None:
    """Those of the configured head are those of linear_logprob itself, and not those of another precision."""
    architecture = read_architecture(path)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 32, generator=generator).bfloat16()
    weight = torch.randn(architecture.vocab_size, 32, generator=generator).bfloat16().requires_grad_()
    model = SimpleNamespace(share_embeddings_and_output_weights=False, output_layer=SimpleNamespace(weight=weight))
    sequences = [TrainingSequence([1], [number] * 11, 1.0, True) for number in (2, 3)]
    (microbatch,) = pack(sequences, PackingPlan(0, 1, microbatch_tokens=24)).microbatches
    trained, found = microbatch.loss_mask, []
    for precision in PRECISIONS:
        config = ModelConfig(path=path, dtype="bfloat16", head_precision=precision)
        run = RunConfig(run_dir=path, num_steps=1, model=config)
        head = ModelBuilder(run, layout, architecture).logprob_head(architecture)
        (of_weight,) = torch.autograd.grad(head(model, hidden[:, None], microbatch).values.sum(), [weight])
        logprobs = linear_logprob(hidden[trained], weight, microbatch.labels[trained], precision=precision)[0]
        (wanted,) = torch.autograd.grad(logprobs.sum(), [weight])
        assert torch.equal(of_weight, wanted)
        found.append(of_weight)
    assert not torch.equal(*found)


@pytest.mark.parametrize("head_fp8", ["transformer_engine_tensor", "transformer_engine_block", "transformer_engine_mx"])
def test_what_transformer_engine_lacks_is_named_before_the_first_batch(
    head_fp8: HeadFp8, layout: ParallelLayout
) -> None:
    with pytest.raises(ValueError, match="scales through Transformer Engine needs an NVIDIA GPU") as raised:
        LogprobHead(layout, 53, precision="fp8_grad", fp8=head_fp8)
    assert "\n" not in str(raised.value)
