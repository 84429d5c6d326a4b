"""model.head_backend: our own kernels or Liger's operator. A stand-in computes what the operator promises."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels.liger_logprob import LigerCall, missing_for_liger
from megatron_oreal.kernels.reference import linear_logprob_reference
from megatron_oreal.models import head_backend, parallel
from megatron_oreal.models.head_backend import choose_operator
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Microbatch, TokenOutputs
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model

CALL = LigerCall(max_tokens=64, hidden_size=32, num_columns=53)


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0, deterministic=False)
    parallel.finalize()


class StandIn:
    """The two packages, with torch's arithmetic."""

    def __init__(self) -> None:
        self.configured: list[SimpleNamespace] = []
        self.calls: list[tuple[int, float]] = []
        self.error: Exception | None = None

    def configure(self, *, bootstrap_group: Any, flsce: SimpleNamespace) -> None:
        if self.error is not None:
            raise self.error
        self.configured.append(flsce)

    def operator(
        self, hidden: Tensor, weight: Tensor, target: Tensor, group: Any, temperature: float, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        assert rest == (-100, 1, True)
        self.calls.append((len(target), temperature))
        logprobs, _, entropy = linear_logprob_reference(hidden, weight, target, temperature=temperature)
        return -logprobs, entropy


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Both packages can be imported, and this machine lacks nothing."""
    made = StandIn()
    kernels, functional = ModuleType("liger_cute_kernels"), ModuleType("functional")
    kernels.__dict__.update(configure=made.configure, FusedLinearCrossEntropyConfig=SimpleNamespace)
    functional.__dict__.update(liger_fused_linear_scaled_cross_entropy_tp=made.operator)
    monkeypatch.setitem(sys.modules, "liger_cute_kernels", kernels)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    monkeypatch.setattr(head_backend, "missing_for_liger", lambda *_: "")
    return made


def build(path: Path, layout: ParallelLayout, backend: str, max_tokens: int = 64, **options: Any) -> TrainableModel:
    architecture = read_architecture(path)
    head = LogprobHead(
        layout, architecture.vocab_size, backend=backend, max_tokens=max_tokens, temperature=0.7, **options
    )
    model = TrainableModel("policy", architecture, head, ModelConfig(path=path, dtype="float32"), layout)
    model.load_weights(path)
    return model


def outputs(model: TrainableModel, head: LogprobHead) -> tuple[TokenOutputs, Tensor]:
    """Of one micro-batch on random hidden states, with the gradient of the weight."""
    chunk = model.chunks[0].requires_grad_(True)
    (microbatch,) = pack(random_sequences(3), PackingPlan(0, 1, microbatch_tokens=64)).microbatches
    assert isinstance(microbatch, Microbatch)
    hidden = torch.randn(len(microbatch.labels), 1, 32, generator=torch.Generator().manual_seed(0))
    found = head(chunk, hidden, microbatch)
    assert found.entropy is not None
    (of_weight,) = torch.autograd.grad((found.values * 3 + found.entropy).sum(), [chunk.output_layer.weight])
    return found, of_weight


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("backend"), tied=False, num_layers=1)


def test_the_operator_takes_the_place_of_our_kernels(path: Path, layout: ParallelLayout, stand_in: StandIn) -> None:
    own, liger = build(path, layout, "own"), build(path, layout, "liger")
    (configured,) = stand_in.configured
    width = liger.chunks[0].output_layer.weight.shape
    assert (configured.max_tokens, configured.local_vocab_size, configured.hidden_size) == (64, *width)
    wanted, found = outputs(own, own.head), outputs(liger, liger.head)  # type: ignore[arg-type]
    assert stand_in.calls and stand_in.calls[0][1] == 0.7
    torch.testing.assert_close(found[0].values, wanted[0].values)
    torch.testing.assert_close(found[0].entropy, wanted[0].entropy)
    torch.testing.assert_close(found[1], wanted[1])


def test_a_call_beyond_what_was_configured_is_our_own(path: Path, layout: ParallelLayout, stand_in: StandIn) -> None:
    liger = build(path, layout, "liger", max_tokens=2)
    outputs(liger, liger.head)  # type: ignore[arg-type]
    assert not stand_in.calls


def test_a_head_that_the_operator_cannot_compute_configures_none(
    path: Path, layout: ParallelLayout, stand_in: StandIn
) -> None:
    build(path, layout, "liger", precision="fp32")
    build(path, layout, "auto")
    assert not stand_in.configured


@pytest.mark.parametrize(
    "error", [RuntimeError("LCK configure rejected:\n rank 0"), ImportError("no NVSHMEM"), OSError("")]
)
def test_what_fails_is_named(error: Exception, layout: ParallelLayout, stand_in: StandIn) -> None:
    stand_in.error = error
    words = " ".join(str(error).split()) or type(error).__name__
    options: dict[str, Any] = {"dtype": torch.bfloat16, "vocab_size": 53, "layout": layout}
    with pytest.raises(ValueError, match=r"model\.head_backend=liger cannot be had: ") as raised:
        choose_operator("liger", CALL, **options)
    assert words in str(raised.value) and str(raised.value).endswith("set model.head_backend to auto")


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert "Hopper" in missing_for_liger(torch.device("cpu"), torch.bfloat16, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (10, 0))
    assert "Hopper" in missing_for_liger(cuda, torch.bfloat16, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert "model.dtype" in missing_for_liger(cuda, torch.float32, 0)
    assert "37 columns are padding" in missing_for_liger(cuda, torch.bfloat16, 37)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "liger_cute_kernels" else name)
    assert missing_for_liger(cuda, torch.bfloat16, 0) == "liger-cute-kernels is not installed"


def test_without_a_gpu_the_setting_is_refused(path: Path, layout: ParallelLayout) -> None:
    with pytest.raises(ValueError, match=r"model\.head_backend=liger cannot be had: it needs a Hopper GPU") as raised:
        build(path, layout, "liger")
    assert "\n" not in str(raised.value)
