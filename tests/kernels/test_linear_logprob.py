"""linear_logprob against its definition: values, gradients, tiles, modes, and a vocabulary in two processes."""

from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_oreal.kernels import linear_logprob as exported
from megatron_oreal.kernels import tiles, torch_rows
from megatron_oreal.kernels.gradients import MAX_ROUNDINGS
from megatron_oreal.kernels.linear_logprob import linear_logprob
from megatron_oreal.kernels.products import Products, adds_to_float32
from megatron_oreal.kernels.reference import linear_logprob_reference

TOKENS, HIDDEN, VOCABULARY = 13, 8, 20
Kernel = Callable[..., tuple[Tensor, ...]]


class MainGrad(torch.nn.Parameter):
    """A weight as Megatron's DistributedDataParallel leaves it."""

    main_grad: Tensor
    grad_added_to_main_grad: bool


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, 16, (TOKENS,), generator=generator)


def wide_inputs(
    dtype: torch.dtype = torch.float32, num_tokens: int = 61, num_columns: int = 199, width: int = 24
) -> tuple[Tensor, Tensor, Tensor]:
    """Several tiles under a small bound, of odd sizes; logits of a standard deviation of 3."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(num_tokens, width, generator=generator).to(dtype)
    weight = (3 / width**0.5 * torch.randn(num_columns, width, generator=generator)).to(dtype)
    return hidden, weight, torch.randint(0, 131, (num_tokens,), generator=generator)


def upstream(index: int, num_tokens: int) -> Tensor:
    """A different gradient for each output."""
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(100 + index))


def run(kernel: Kernel, hidden: Tensor, weight: Tensor, target: Tensor, used: str, **options: Any) -> list[Tensor]:
    """The three outputs, and the gradients of hidden and weight through those in `used` (digits of output numbers)."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    outputs = kernel(hidden, weight, target, **options)
    total = sum(((outputs[int(i)] * upstream(int(i), len(target))).sum() for i in used), torch.zeros(()))
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, [hidden, weight])]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for index, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            value.double(), wanted.double(), rtol=0, atol=tolerance * scale, msg=lambda m, i=index: f"{i}: {m}"
        )


def expected_from_definition(used: str, dtype: torch.dtype = torch.float32, **options: Any) -> list[Tensor]:
    hidden, weight, target = make_inputs(dtype)
    return run(linear_logprob_reference, hidden.double(), weight.double(), target, used, **options)


def test_the_definition_by_hand() -> None:
    """Logits [ln 1, ln 2, ln 5] of one token: p = [1/8, 1/4, 5/8]; at temperature 1/2, [1, 4, 25] / 30."""
    hidden, weight = torch.ones(1, 1).double(), torch.tensor([[1.0], [2.0], [5.0]]).double().log()
    for kernel, tolerance in ((linear_logprob_reference, 1e-12), (linear_logprob, 1e-6)):
        options = {} if kernel is linear_logprob_reference else {"entropy": True}
        logprobs, logsumexp, entropy = kernel(hidden, weight, torch.tensor([1]), **options)  # type: ignore[operator]
        assert logprobs.item() == pytest.approx(log(1 / 4), rel=tolerance)
        assert logsumexp.item() == pytest.approx(log(8), rel=tolerance)
        assert entropy.item() == pytest.approx(sum(-p * log(p) for p in (1 / 8, 1 / 4, 5 / 8)), rel=tolerance)
        logprobs, logsumexp, entropy = kernel(hidden, weight, torch.tensor([2]), temperature=0.5, **options)  # type: ignore[operator]
        assert logprobs.item() == pytest.approx(log(25 / 30), rel=tolerance)
        assert logsumexp.item() == pytest.approx(log(30), rel=tolerance)
        assert entropy.item() == pytest.approx(sum(-p * log(p) for p in (1 / 30, 4 / 30, 25 / 30)), rel=tolerance)
        logprobs, _, _ = kernel(hidden, weight, torch.tensor([1]), valid_vocab=2, **options)  # type: ignore[operator]
        assert logprobs.item() == pytest.approx(log(2 / 3), rel=tolerance)


@pytest.mark.parametrize("used", ["0", "1", "2", "01", "02", "12", "012"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"valid_vocab": 17}, {"valid_vocab": 16, "temperature": 3.0}]
)
def test_values_and_gradients(used: str, options: dict[str, Any]) -> None:
    found = run(linear_logprob, *make_inputs(), used, entropy=True, **options)
    assert_close(found, expected_from_definition(used, **options), 1e-5)
    assert all(value.dtype == torch.float32 for value in found)
    assert found[-1][options.get("valid_vocab", VOCABULARY) :].eq(0).all()  # padding gets no gradient


@pytest.mark.parametrize("used", ["0", "1", "01"])
def test_without_the_entropy(used: str) -> None:
    hidden, weight, target = make_inputs()
    found = run(lambda *inputs: linear_logprob(*inputs)[:2], hidden, weight, target, used)  # type: ignore[arg-type, return-value]
    expected = expected_from_definition(used)
    assert_close(found, expected[:2] + expected[3:], 1e-5)
    assert linear_logprob(hidden, weight, target)[2] is None


@pytest.mark.parametrize("limit", [1, 10_000, 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"valid_vocab": 131, "temperature": 0.7}])
def test_tiles_change_nothing(
    monkeypatch: pytest.MonkeyPatch, limit: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    """From tiles of 16 x 16, the smallest, to a few; a block of rows within them has one row, or all."""
    monkeypatch.setattr(tiles, "CPU_BYTES", limit)
    monkeypatch.setattr(torch_rows, "BLOCK_BYTES", limit)
    inputs = wide_inputs(dtype)
    found = run(linear_logprob, *inputs, "012", entropy=True, **options)
    expected = run(linear_logprob_reference, *(part.double() for part in inputs[:2]), inputs[2], "012", **options)
    assert_close(found[:3], expected[:3], 1e-5)
    assert_close(found[3:], expected[3:], 1e-5 if dtype is torch.float32 else 2e-2)
    assert found[-1][options.get("valid_vocab", 199) :].eq(0).all()


@pytest.mark.parametrize(
    ("dtype", "precision", "value_error", "gradient_error"),
    [
        (torch.float32, "bf16", 1e-5, 1e-5),
        (torch.float32, "fp32", 1e-5, 1e-5),
        (torch.bfloat16, "bf16", 1e-3, 5e-3),
        (torch.bfloat16, "fp32", 1e-3, 5e-3),
        (torch.float16, "bf16", 1e-3, 5e-3),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 61, 257])
def test_accuracy(
    dtype: torch.dtype, precision: str, value_error: float, gradient_error: float, num_tokens: int
) -> None:
    """Against float64: absolute for outputs, relative in norm for gradients, which have the dtype of the inputs."""
    hidden, weight, target = wide_inputs(dtype, num_tokens=num_tokens, num_columns=1009, width=96)
    options = {"temperature": 0.8, "valid_vocab": 1003}
    found = run(linear_logprob, hidden, weight, target, "0", entropy=True, precision=precision, **options)
    expected = run(linear_logprob_reference, hidden.double(), weight.double(), target, "0", **options)
    for value, wanted in zip(found[:3], expected[:3], strict=True):
        assert value.dtype is torch.float32 and float((value - wanted).abs().max()) <= value_error
    for gradient, wanted in zip(found[3:], expected[3:], strict=True):
        assert gradient.dtype is dtype and float((gradient - wanted).norm() / wanted.norm()) <= gradient_error


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("num_blocks", [MAX_ROUNDINGS, MAX_ROUNDINGS + 1, 64])
@pytest.mark.parametrize("in_main_grad", [False, True])
def test_half_precision_sums_over_many_blocks_of_tokens(
    monkeypatch: pytest.MonkeyPatch, mode: str, num_blocks: int, in_main_grad: bool
) -> None:
    """Few are added up in the gradient itself, with a rounding a block; more in float32. So for a bf16 main_grad."""
    monkeypatch.setattr(tiles, "CPU_BYTES", 1)  # the smallest tiles
    hidden, weight, target = wide_inputs(torch.bfloat16, num_tokens=num_blocks * tiles.ALIGNMENT)
    scale = upstream(0, len(target))
    options: dict[str, Any] = {"mode": mode, "token_scale": scale} if mode == "eager" else {}
    leaf, exact = MainGrad(weight), weight.double().requires_grad_()
    leaf.main_grad = torch.zeros_like(weight)
    logprobs = linear_logprob(hidden, leaf, target, accumulate_main_grad=in_main_grad, **options)[0]
    (logprobs * scale).sum().backward()
    (linear_logprob_reference(hidden.double(), exact, target)[0] * scale).sum().backward()
    found = leaf.main_grad if in_main_grad else leaf.grad
    assert found is not None and found.dtype is torch.bfloat16 and exact.grad is not None
    assert float((found - exact.grad).norm() / exact.grad.norm()) <= (3e-3 if num_blocks > MAX_ROUNDINGS else 5e-3)


@pytest.mark.parametrize("is_old", [False, True])
def test_sums_of_half_precision_products(monkeypatch: pytest.MonkeyPatch, is_old: bool) -> None:
    """A CPU in the place of a GPU: torch before 2.10 has the products, but does not add them to float32."""
    mm, addmm = torch.mm, torch.addmm

    def half_mm(left: Tensor, right: Tensor, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return mm(left.to(out_dtype), right.to(out_dtype), out=out)

    def half_addmm(total: Tensor, left: Tensor, right: Tensor, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        if is_old and total.dtype is not left.dtype:
            raise RuntimeError("self and mat2 must have the same dtype")
        return addmm(total, left.to(out_dtype), right.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", half_mm)
    monkeypatch.setattr(torch, "addmm", half_addmm)
    adds_to_float32.cache_clear()
    hidden, weight, _ = wide_inputs(torch.bfloat16)
    products, out = Products(torch.bfloat16), torch.full((61, 199), torch.nan)
    products.grad_hidden(hidden, weight.T, out, accumulate=False)
    products.grad_hidden(hidden, weight.T, out, accumulate=True)
    assert adds_to_float32("cpu") == (not is_old)
    adds_to_float32.cache_clear()
    torch.testing.assert_close(out, 2 * (hidden.float() @ weight.float().T))


def test_the_same_call_gives_the_same_bits() -> None:
    inputs = wide_inputs(torch.bfloat16)
    first, second = (run(linear_logprob, *inputs, "012", entropy=True, temperature=0.7) for _ in range(2))
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("limit", "least", "most"), [(100, 0, 0), (40_000, 0.1, 0.9), (10**9, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_are_those_that_would_be_computed_again(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, limit: int, least: float, most: float
) -> None:
    """Of all tiles at least and at most these shares are kept; a second backward pass finds none of them."""
    monkeypatch.setattr(tiles, "CPU_BYTES", limit)
    products, logits = [], Products.logits
    monkeypatch.setattr(Products, "logits", lambda *inputs: products.append(1) or logits(*inputs))
    hidden, weight, target = wide_inputs(dtype)
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    logprobs, _, entropy = linear_logprob(*inputs, target, entropy=True)
    assert entropy is not None
    num_tiles, loss = len(products), (logprobs + 0.1 * entropy).sum()
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    num_kept = 2 * num_tiles - len(products)
    assert least * num_tiles <= num_kept <= most * num_tiles
    second = torch.autograd.grad(loss, inputs)
    assert len(products) == 3 * num_tiles - num_kept
    assert all(torch.equal(mine, other) for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize("limit", [1, 10_000, 10**9])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "valid_vocab": 131}])
def test_eager_gradients_are_those_of_the_recomputation(
    monkeypatch: pytest.MonkeyPatch, limit: int, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(tiles, "CPU_BYTES", limit)
    hidden, weight, target = wide_inputs()
    scale = torch.randn(len(target), generator=torch.Generator().manual_seed(3))
    results = []
    for mode, token_scale in (("recompute", None), ("eager", scale)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        outputs = linear_logprob(*leaves, target, entropy=True, mode=mode, token_scale=token_scale, **options)  # type: ignore[arg-type]
        loss = -2.5 * (scale * outputs[0]).sum()
        results.append([*(output.detach() for output in outputs), *torch.autograd.grad(loss, leaves)])  # type: ignore[union-attr]
        assert [output.requires_grad for output in outputs] == [True, mode == "recompute", mode == "recompute"]  # type: ignore[union-attr]
    assert_close(results[1], results[0], 1e-5)


def test_eager_refuses_another_loss_and_a_second_pass() -> None:
    hidden, weight, target = wide_inputs()
    hidden.requires_grad_()
    scale = torch.linspace(-1, 1, len(target))
    eager = partial(linear_logprob, hidden, weight, target, mode="eager", token_scale=scale)
    with pytest.raises(ValueError, match="not a multiple of token_scale; use mode=recompute"):
        eager()[0].square().sum().backward()
    logprobs = eager()[0]
    (logprobs * scale).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        (logprobs * scale).sum().backward()
    (linear_logprob(hidden, weight, target, mode="eager", token_scale=0 * scale)[0] * 0).sum().backward()
    with torch.no_grad():
        assert torch.equal(eager()[0], linear_logprob(hidden, weight, target)[0])


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(mode: str, frozen: int) -> None:
    *inputs, target = wide_inputs()
    options: dict[str, Any] = {"token_scale": torch.ones(len(target))} if mode == "eager" else {}
    inputs[1 - frozen].requires_grad_()
    linear_logprob(*inputs, target, mode=mode, **options)[0].sum().backward()
    learning = [part.detach().double().requires_grad_() for part in inputs]
    linear_logprob_reference(*learning, target)[0].sum().backward()
    assert inputs[frozen].grad is None
    wanted, found = learning[1 - frozen].grad, inputs[1 - frozen].grad
    assert wanted is not None and found is not None
    assert_close([found], [wanted], 1e-5)


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_in_main_grad(mode: str, dtype: torch.dtype) -> None:
    """Two micro-batches, and an embedding that is tied to the head: autograd's sum has the embedding's part only."""
    hidden, weight, target = wide_inputs(dtype)
    scale = torch.linspace(-1, 1, len(target))
    options: dict[str, Any] = {"mode": mode, "token_scale": scale} if mode == "eager" else {}
    tied = MainGrad(weight)
    tied.main_grad, tied.grad_added_to_main_grad = torch.full_like(weight, 0.25, dtype=torch.float32), False
    for _ in range(2):
        logprobs = linear_logprob(hidden, tied, target, accumulate_main_grad=True, **options)[0]
        (3 * (scale * logprobs).sum() + tied[7].sum()).backward()
    exact = weight.double().requires_grad_()
    (3 * (scale * linear_logprob_reference(hidden.double(), exact, target)[0]).sum()).backward()
    assert tied.grad_added_to_main_grad and exact.grad is not None and tied.grad is not None
    # float32 all along: bf16 inputs do not round the sum.
    assert_close([tied.main_grad], [0.25 + 2 * exact.grad], 1e-5)
    embedding = torch.zeros_like(weight)
    embedding[7] = 2.0
    assert torch.equal(tied.grad, embedding)


def test_a_weight_without_main_grad_gets_its_gradient() -> None:
    hidden, weight, target = wide_inputs()
    fused, plain = (
        run(partial(linear_logprob, accumulate_main_grad=flag), hidden, weight, target, "0", entropy=True)
        for flag in (True, False)
    )
    assert torch.equal(fused[4], plain[4]) and plain[4].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
def test_a_hidden_state_that_is_not_finite_is_reported(value: float, options: dict[str, Any]) -> None:
    """In the values and the gradient of its token, and in no other token."""
    hidden, weight, target = wide_inputs()
    clean = run(linear_logprob, hidden, weight, target, "0", entropy=True, **options)
    hidden[5, 3] = value
    found = run(linear_logprob, hidden, weight, target, "0", entropy=True, **options)
    others = torch.arange(len(target)) != 5
    for output, wanted in zip(found[:4], clean[:4], strict=True):
        assert output[5].isnan().any()
        assert torch.equal(output[others], wanted[others])
    assert found[4].isnan().any()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}])
def test_extreme_logits_neither_overflow_nor_lose_the_target(options: dict[str, Any]) -> None:
    """Up to 1e4 and more, where float32 is exact to 1e-3 only; the entropy is a difference that stays exact."""
    hidden, weight, target = wide_inputs()
    hidden = hidden * 1000
    assert 1e4 < float((hidden @ weight.T).abs().max()) < 3e4
    found = run(linear_logprob, hidden, weight, target, "012", entropy=True, **options)
    expected = run(linear_logprob_reference, hidden.double(), weight.double(), target, "012", **options)
    assert all(value.isfinite().all() for value in found)
    assert_close(found[:2], expected[:2], 1e-6)
    assert_close(found[2:3], expected[2:3], 1e-2)


def test_no_tokens() -> None:
    hidden, weight, target = make_inputs()
    hidden, weight = hidden[:0].requires_grad_(), weight.requires_grad_()
    outputs = linear_logprob(hidden, weight, target[:0], entropy=True)
    assert [tuple(output.shape) for output in outputs if output is not None] == [(0,)] * 3
    grad_hidden, grad_weight = torch.autograd.grad(outputs[0].sum(), [hidden, weight])
    assert grad_hidden.shape == (0, HIDDEN) and grad_weight.eq(0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(TOKENS, HIDDEN + 1)}, r"must be \[T, H\] and \[V, H\]"),
        ({"hidden": torch.zeros(1, TOKENS, HIDDEN)}, r"must be \[T, H\] and \[V, H\]"),
        ({"target": torch.zeros(TOKENS - 1, dtype=torch.int64)}, "one token id a row of hidden, 13"),
        ({"hidden": torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16)}, "cast one of them"),
        ({"target": torch.full((TOKENS,), VOCABULARY)}, r"ids in \[0, 20\), got \[20, 20\]"),
        ({"target": torch.full((TOKENS,), -100)}, r"ids in \[0, 20\), got \[-100, -100\]"),
        ({"target": torch.full((TOKENS,), 18), "valid_vocab": 18}, r"ids in \[0, 18\)"),
        ({"valid_vocab": VOCABULARY + 1}, r"valid_vocab must be in \[1, 20\]"),
        ({"valid_vocab": 0}, r"valid_vocab must be in \[1, 20\]"),
        ({"precision": "int8"}, "precision must be one of fp32, bf16, fp8_grad, got int8"),
        ({"mode": "lazy"}, "mode must be recompute or eager, got lazy"),
        ({"mode": "eager"}, "needs token_scale, one number a target, 13, got None"),
        ({"mode": "eager", "token_scale": torch.ones(1)}, r"one number a target, 13, got \(1,\)"),
        ({"token_scale": torch.ones(TOKENS)}, "token_scale belongs to mode=eager"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"temperature": -1.0}, "temperature must be > 0"),
    ],
)
def test_bad_inputs_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    hidden, weight, target = make_inputs()
    with pytest.raises(ValueError, match=message) as error:
        linear_logprob(**({"hidden": hidden, "weight": weight, "target": target} | change))
    assert "\n" not in str(error.value)


def test_a_target_that_no_column_has_is_impossible() -> None:
    """What an accelerator sees, where ids are not compared: minus infinity, which no loss survives unnoticed."""
    reduced = torch_rows.reduce_rows(torch.zeros(2, 4), torch.tensor([1, 7]), 4, 1.0, with_entropy=False)
    assert reduced[2].tolist() == [0.0, -torch.inf]


def test_the_package_exports_it() -> None:
    assert exported is linear_logprob


# A vocabulary over two processes: all cases in one launch.

CASES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"valid_vocab": 17},
    {"valid_vocab": 11},  # one column of the second process
    {"valid_vocab": 10},  # the second process has padding only
]
COMBINATIONS = [(options, used) for options in CASES for used in ("0", "012")]


def targets_below(options: dict[str, Any]) -> Tensor:
    return make_inputs()[2] % options.get("valid_vocab", VOCABULARY)


TILED = {"valid_vocab": 131, "temperature": 0.7}  # a third of the second process's columns


def tiled(mode: str, rank: int, group: dist.ProcessGroup | None) -> list[Tensor]:
    """In several tiles of tokens: each meets the other process, which has other tiles of columns."""
    hidden, weight, target = wide_inputs(num_columns=198)
    scale = upstream(0, len(target))
    options: dict[str, Any] = {"mode": mode, "token_scale": scale} if mode == "eager" else {}
    inputs = hidden.requires_grad_(), weight.chunk(2)[rank].clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CPU_BYTES", 20_000)
        outputs = linear_logprob(*inputs, target, tp_group=group, entropy=True, **TILED, **options)  # type: ignore[arg-type]
        gradients = torch.autograd.grad((scale * outputs[0]).sum(), inputs)
    return [*(output.detach() for output in outputs if output is not None), *gradients]


def vocabulary_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    group = dist.group.WORLD
    hidden, weight, target = make_inputs()
    part = weight.chunk(2)[rank]
    results = [
        run(linear_logprob, hidden, part, targets_below(options), used, entropy=True, tp_group=group, **options)
        for options, used in COMBINATIONS
    ]
    assert linear_logprob(hidden[:0], part, target[:0], tp_group=group)[0].shape == (0,)
    results += [tiled(mode, rank, group) for mode in ("recompute", "eager")]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(vocabulary_rank, args=(str(tmp_path),), nprocs=2)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    hidden, weight, _ = make_inputs()
    wide_hidden, wide_weight, wide_target = wide_inputs(num_columns=198)
    wanted = [
        run(linear_logprob_reference, hidden.double(), weight.double(), targets_below(options), used, **options)
        for options, used in COMBINATIONS
    ]
    wide = run(linear_logprob_reference, wide_hidden.double(), wide_weight.double(), wide_target, "0", **TILED)
    for expected, mine, other in zip([*wanted, wide, wide], first, second, strict=True):
        for index in range(4):  # outputs and the gradient of hidden are whole on both
            torch.testing.assert_close(mine[index], other[index], rtol=0, atol=0)
        assert_close([*mine[:4], torch.cat([mine[4], other[4]])], expected, 1e-5)
