"""linear_logprob against its definition: values, gradients, padding, chunks, and a vocabulary in two processes."""

import importlib
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_oreal.kernels import linear_logprob as exported
from megatron_oreal.kernels.linear_logprob import linear_logprob, reduce_chunk
from megatron_oreal.kernels.reference import linear_logprob_reference

TOKENS, HIDDEN, VOCABULARY = 13, 8, 20
MODULE = importlib.import_module("megatron_oreal.kernels.linear_logprob")  # the function has the same name
Kernel = Callable[..., tuple[Tensor, ...]]


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype)
    return hidden, weight, torch.randint(0, 16, (TOKENS,), generator=generator)


def upstream(index: int) -> Tensor:
    """A different gradient for each output."""
    return torch.randn(TOKENS, generator=torch.Generator().manual_seed(100 + index))


def run(kernel: Kernel, hidden: Tensor, weight: Tensor, target: Tensor, used: str, **options: Any) -> list[Tensor]:
    """The three outputs, and the gradients of hidden and weight through those in `used` (digits of output numbers)."""
    hidden, weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    outputs = kernel(hidden, weight, target, **options)
    total = sum(((outputs[int(i)] * upstream(int(i))).sum() for i in used), torch.zeros(()))
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


@pytest.mark.parametrize("tokens_a_chunk", [1, 4, 5, 13, 100])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, tokens_a_chunk: int) -> None:
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 4 * VOCABULARY * tokens_a_chunk)
    found = run(linear_logprob, *make_inputs(), "012", entropy=True, valid_vocab=18)
    assert_close(found, expected_from_definition("012", valid_vocab=18), 1e-5)


def test_a_row_larger_than_a_chunk_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "CHUNK_BYTES", 1)
    assert_close(run(linear_logprob, *make_inputs(), "012", entropy=True), expected_from_definition("012"), 1e-5)


def test_half_precision_inputs() -> None:
    """bf16 logits are rounded; `precision="fp32"` computes with the same inputs without that rounding."""
    inputs, expected = make_inputs(torch.bfloat16), expected_from_definition("012", torch.bfloat16)
    exact = run(linear_logprob, *inputs, "012", entropy=True, precision="fp32")
    assert_close(exact[:3], expected[:3], 1e-5)
    assert_close(exact[3:], expected[3:], 2**-8)  # the gradients are stored as bf16
    rounded = run(linear_logprob, *inputs, "012", entropy=True)
    assert_close(rounded, expected, 0.05)
    assert [value.dtype for value in rounded] == [torch.float32] * 3 + [torch.bfloat16] * 2


def test_large_logits_neither_overflow_nor_lose_the_target() -> None:
    hidden, weight, target = make_inputs()
    found = run(linear_logprob, hidden * 1000, weight, target, "012", entropy=True)
    expected = run(linear_logprob_reference, hidden.double() * 1000, weight.double(), target, "012")
    assert all(value.isfinite().all() for value in found)
    assert_close(found[:2], expected[:2], 1e-5)


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
    reduced = reduce_chunk(torch.zeros(2, 4), torch.tensor([1, 7]), columns=4, with_entropy=False)
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
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(vocabulary_rank, args=(str(tmp_path),), nprocs=2)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    hidden, weight, _ = make_inputs()
    for (options, used), mine, other in zip(COMBINATIONS, first, second, strict=True):
        target = targets_below(options)
        expected = run(linear_logprob_reference, hidden.double(), weight.double(), target, used, **options)
        for index in range(4):  # outputs and the gradient of hidden are whole on both
            torch.testing.assert_close(mine[index], other[index], rtol=0, atol=0)
        assert_close([*mine[:4], torch.cat([mine[4], other[4]])], expected, 1e-5)
