"""linear_logprob on CUDA: accuracy of half-precision products, Triton against torch rows, memory, both modes."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import blocks, linear_logprob, products, tiles, torch_rows
from megatron_oreal.kernels.reference import linear_logprob_reference

pytestmark = pytest.mark.gpu
MODULE = importlib.import_module("megatron_oreal.kernels.linear_logprob")
GIB = 2**30


def make(num_tokens: int, num_columns: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(num_tokens, width, device="cuda", generator=generator).to(dtype)
    weight = (3 / width**0.5 * torch.randn(num_columns, width, device="cuda", generator=generator)).to(dtype)
    return hidden, weight, torch.randint(0, num_columns - 7, (num_tokens,), device="cuda", generator=generator)


def results(hidden: Tensor, weight: Tensor, target: Tensor, mode: str = "recompute", **options: Any) -> list[Tensor]:
    """Outputs, and the gradients through the log-probs; through the entropy too where that is recomputed."""
    inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    scale = torch.linspace(-1, 1, len(target), device=target.device)
    if hidden.dtype is torch.float64:
        outputs: Any = linear_logprob_reference(*inputs, target, **options)
    else:
        eager = {"mode": mode, "token_scale": scale} if mode == "eager" else {}
        outputs = linear_logprob(*inputs, target, entropy=True, **eager, **options)
    gradients = torch.autograd.grad((2 * scale * outputs[0]).sum(), inputs)
    return [*(output.detach() for output in outputs), *gradients]


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("shape", [(1, 64, 16), (257, 1031, 136), (300, 40009, 64)])
@pytest.mark.parametrize(
    ("dtype", "precision", "value_error", "gradient_error"),
    [
        (torch.float32, "bf16", 1e-5, 1e-5),
        (torch.bfloat16, "fp32", 1e-3, 5e-3),
        (torch.bfloat16, "bf16", 1e-3, 5e-3),
        (torch.float16, "bf16", 1e-3, 5e-3),
    ],
)
def test_accuracy(
    dtype: torch.dtype,
    precision: str,
    value_error: float,
    gradient_error: float,
    shape: tuple[int, int, int],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against float64, over several blocks and tiles: absolute for outputs, relative in norm for gradients."""
    monkeypatch.setattr(tiles, "CUDA_BYTES", 2**22)
    monkeypatch.setattr(blocks, "TILE_BYTES", 2**20)
    inputs = make(*shape, dtype)
    options: dict[str, Any] = {"temperature": 0.8, "valid_vocab": shape[1] - 3}
    found = results(*inputs, mode=mode, precision=precision, **options)
    wanted = results(inputs[0].double(), inputs[1].double(), inputs[2], **options)
    for value, exact in zip(found[:3], wanted[:3], strict=True):
        assert float((value - exact).abs().max()) <= value_error * max(1.0, float(exact.abs().max()) / 10)
    for gradient, exact in zip(found[3:], wanted[3:], strict=True):
        assert gradient.dtype is dtype
        assert float((gradient - exact).norm() / exact.norm()) <= gradient_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_rows_agree_with_torch_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    triton_rows = pytest.importorskip("megatron_oreal.kernels.triton_rows")
    assert MODULE.row_kernels("cuda") is triton_rows
    hidden, weight, target = make(129, 20011, 64, dtype)
    found = []
    for rows in (triton_rows, torch_rows):
        monkeypatch.setattr(MODULE, "row_kernels", lambda _device_type, rows=rows: rows)
        inputs = [hidden.requires_grad_(), weight.requires_grad_()]
        outputs = linear_logprob(*inputs, target, entropy=True, temperature=0.9, valid_vocab=20005)
        loss = sum(((number + 1) * output).sum() for number, output in enumerate(outputs))  # type: ignore[operator]
        found.append([*outputs, *torch.autograd.grad(loss, inputs)])  # type: ignore[arg-type]
    for mine, other in zip(*found, strict=True):
        error = (mine.double() - other.double()).norm() / other.double().norm()
        assert float(error) <= (1e-5 if mine.dtype is torch.float32 else 4e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    inputs = make(64, 1031, 32, torch.bfloat16)
    with torch.cuda.device(0):
        here, there = results(*inputs), results(*(part.to("cuda:1") for part in inputs))
    for mine, other in zip(here, there, strict=True):
        assert torch.equal(mine.cpu(), other.cpu())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hidden_state_that_is_not_finite_is_reported(value: float) -> None:
    hidden, weight, target = make(64, 1031, 32, torch.bfloat16)
    hidden[5, 3] = value
    logprobs, _, entropy = linear_logprob(hidden, weight, target, entropy=True)
    assert entropy is not None
    assert logprobs.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[5]]


def test_a_stray_target_has_no_probability() -> None:
    hidden, weight, target = make(8, 100, 32, torch.bfloat16)
    target[2], target[3] = -100, 100
    logprobs = linear_logprob(hidden, weight, target)[0]
    assert logprobs.isneginf().nonzero().tolist() == [[2], [3]]


def test_eager_turns_another_loss_into_nan() -> None:
    hidden, weight, target = make(8, 100, 32, torch.bfloat16)
    scale = torch.linspace(-1, 1, 8, device="cuda")
    logprobs = linear_logprob(hidden.requires_grad_(), weight, target, mode="eager", token_scale=scale)[0]
    logprobs.square().sum().backward()
    assert hidden.grad is not None and hidden.grad.isnan().all()


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds_in_place", [True, False])
def test_accumulation_in_main_grad(
    mode: str, dtype: torch.dtype, adds_in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as with a torch that cannot add half-precision products to float32."""
    if not adds_in_place:
        monkeypatch.setattr(products, "adds_to_float32", lambda _device_type: False)
    hidden, weight, target = make(256, 5003, 64, torch.bfloat16)
    scale = torch.linspace(-1, 1, 256, device="cuda")
    options: dict[str, Any] = {"mode": mode, "token_scale": scale} if mode == "eager" else {}
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros_like(weight, dtype=dtype)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    for _ in range(2):
        (scale * linear_logprob(hidden, weight, target, accumulate_main_grad=True, **options)[0]).sum().backward()
    exact = weight.detach().double().requires_grad_()
    (2 * scale * linear_logprob_reference(hidden.double(), exact, target)[0]).sum().backward()
    assert exact.grad is not None and weight.grad is None
    error = (weight.main_grad - exact.grad).norm() / exact.grad.norm()  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad and float(error) <= 5e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["recompute", "eager"])
def test_half_precision_sums_over_many_blocks_of_tokens(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "CUDA_BYTES", 1)  # the smallest blocks
    inputs = make(24 * blocks.TOKEN_ALIGNMENT, 1031, 64, torch.bfloat16)
    found = results(*inputs, mode=mode)[-1]
    exact = results(inputs[0].double(), inputs[1].double(), inputs[2])[-1]
    assert float((found - exact).norm() / exact.norm()) <= 5e-3


@pytest.mark.parametrize("with_entropy", [True, False])
def test_what_is_kept_changes_nothing(with_entropy: bool) -> None:
    """A second backward pass, which finds nothing kept, has the same bits; another number of blocks, other rounding."""
    hidden, weight, target = make(384, 5003, 64, torch.bfloat16)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    scale, found = torch.linspace(-1, 1, 384, device="cuda"), []
    for num_bytes in (2**28, 2 * 128 * 5003 + 2**22):
        outputs = linear_logprob(*inputs, target, entropy=with_entropy, temperature=0.9, memory_bytes=num_bytes)
        loss = sum((scale * output).sum() for output in outputs if output is not None)
        found.append(torch.autograd.grad(loss, inputs, retain_graph=True))  # type: ignore[arg-type]
        again = torch.autograd.grad(loss, inputs)  # type: ignore[arg-type]
        assert all(torch.equal(mine, other) for mine, other in zip(found[-1], again, strict=True))
    for mine, other in zip(*found, strict=True):
        assert float((mine - other).float().norm() / other.float().norm()) <= 4e-3


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(8192, 152064), (65536, 19008), (2048, 152064)])
def test_peak_memory(mode: str, num_tokens: int, num_columns: int) -> None:
    """Beyond inputs and gradients at most 1.5 GiB, where the float32 logits alone would be up to 4.6."""
    hidden, weight, target = make(num_tokens, num_columns, 5120, torch.bfloat16)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    options: dict[str, Any] = {"token_scale": torch.ones(num_tokens, device="cuda")} if mode == "eager" else {}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logprobs, _, entropy = linear_logprob(*inputs, target, entropy=True, mode=mode, **options)  # type: ignore[arg-type]
    loss = logprobs.sum() if mode == "eager" else logprobs.sum() + entropy.sum()  # type: ignore[union-attr]
    gradients = torch.autograd.grad(loss, inputs)
    extra = torch.cuda.max_memory_allocated() - before
    gradient_bytes = sum(gradient.numel() * gradient.element_size() for gradient in gradients)
    assert extra - gradient_bytes <= 1.5 * GIB
