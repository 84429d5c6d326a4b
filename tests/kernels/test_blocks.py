"""The passes over blocks, on a CPU with torch_rows: their plan, and their results against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_oreal.kernels import blocks, linear_logprob
from megatron_oreal.kernels.block_passes import HalfPrecisionGradients
from megatron_oreal.kernels.blocks import BlockPlan, BlockSizes
from megatron_oreal.kernels.precision import Arithmetic
from megatron_oreal.kernels.products import Products
from megatron_oreal.kernels.reference import linear_logprob_reference

MIB = 2**20
FLOAT32 = Products(torch.float32)
HALF = Arithmetic(FLOAT32, lambda: HalfPrecisionGradients(FLOAT32, torch.bfloat16))


def sizes(tokens: int, columns: int, total: int = 1472 * MIB, keeps: bool = True) -> BlockSizes:
    """Of a model with 5120 hidden units on a GPU with 132 multiprocessors, and gradients in half precision."""
    return BlockSizes(tokens, columns, 5120, total, 0, 4 * 5120, 2, 132, keeps)


def test_what_fits_is_kept_whole() -> None:
    """8192 tokens x 19008 columns are 297 MiB: one block. Tiles: 160 MiB are 5120 columns of float32 logits."""
    plan = BlockPlan.choose(sizes(8192, 19008))
    assert plan == BlockPlan((slice(0, 8192),), num_kept=1, tile_columns=5120)
    assert [part.stop for part in plan.columns(19008)] == [5120, 10240, 15360, 19008]


def test_a_kept_block_takes_the_memory_that_there_is() -> None:
    """8192 tokens x 152064 columns are 2376 MiB: of 1472 - 160 for a tile, 35 times 128 tokens are kept."""
    plan = BlockPlan.choose(sizes(8192, 152064))
    assert plan == BlockPlan((slice(0, 4480), slice(4480, 8192)), num_kept=1, tile_columns=8448)
    assert 4480 * 2 * 152064 <= (1472 - 160) * MIB < (4480 + 128) * 2 * 152064
    # 64 columns a multiprocessor: with 128 x 256 tiles of the product none waits at the end.
    assert 4480 // 128 * 8448 // 256 % 33 == 0
    assert BlockPlan.choose(sizes(8192, 152064, total=3 * 2**30)).num_kept == 1
    assert BlockPlan.choose(sizes(8192, 152064, total=3 * 2**30)).tokens == (slice(0, 8192),)


def test_without_keeping_blocks_are_as_few_as_fit() -> None:
    plan = BlockPlan.choose(sizes(8192, 152064, keeps=False))
    assert plan.tokens == (slice(0, 4096), slice(4096, 8192)) and plan.num_kept == 0


def test_what_does_not_fit_at_all_is_cut_into_the_smallest_blocks() -> None:
    plan = BlockPlan.choose(sizes(300, 152064, total=1))
    assert plan.tokens == (slice(0, 128), slice(128, 256), slice(256, 300)) and plan.num_kept == 0
    assert BlockPlan.choose(sizes(0, 152064)).tokens == ()


def test_the_plan_stays_within_its_bytes() -> None:
    for tokens in (1, 500, 4096, 65536):
        for columns in (512, 19008, 152064):
            for total in (300 * MIB, 1472 * MIB, 3 * 2**30):
                plan = BlockPlan.choose(sizes(tokens, columns, total))
                block = plan.tokens[0].stop
                kept = sum(2 * columns * (rows.stop - rows.start) for rows in plan.tokens[: plan.num_kept])
                beside = max(4 * block * min(columns, plan.tile_columns), 4 * 5120 * block)
                assert max(kept, 2 * columns * block) + beside <= total


def make(num_tokens: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 48, generator=generator).bfloat16()
    weight = (3 / 48**0.5 * torch.randn(num_columns, 48, generator=generator)).bfloat16()
    return hidden, weight, torch.randint(0, num_columns - 13, (num_tokens,), generator=generator)


def upstream(num_tokens: int) -> Tensor:
    return torch.randn(3, num_tokens, generator=torch.Generator().manual_seed(1))


def run(hidden: Tensor, weight: Tensor, target: Tensor, used: str = "012", **options: Any) -> list[Tensor]:
    """Outputs and gradients, of float64 inputs by the definition."""
    inputs = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
    scales = upstream(len(target))
    if hidden.dtype is torch.float64:
        outputs: Any = linear_logprob_reference(*inputs, target, **options)
    else:
        if options.get("mode") == "eager":
            options["token_scale"] = scales[0]
        outputs = linear_logprob(*inputs, target, entropy=True, **options)
    loss = sum((scales[int(number)] * outputs[int(number)]).sum() for number in used)
    return [*(output.detach() for output in outputs), *torch.autograd.grad(loss, inputs)]  # type: ignore[arg-type]


def assert_close(found: list[Tensor], wanted: list[Tensor], gradient_error: float) -> None:
    for value, exact in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(value.double(), exact, rtol=0, atol=1e-5)
    for gradient, exact in zip(found[3:], wanted[3:], strict=True):
        assert float((gradient.double() - exact).norm() / exact.norm()) <= gradient_error


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("num_bytes", [1, 4 * MIB, 2**30])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "valid_vocab": 4990}])
@pytest.mark.parametrize(("precision", "gradient_error"), [(HALF, 4e-3), ("fp8_grad", 0.045)])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    num_bytes: int,
    options: dict[str, Any],
    precision: Any,
    gradient_error: float,
) -> None:
    """Blocks of 128 tokens or of all, kept or not, in several tiles of columns; more than one shift a tile."""
    monkeypatch.setattr(blocks, "TILE_BYTES", 4 * 300 * 4352)
    hidden, weight, target = make(300, 5003)
    used = "0" if mode == "eager" else "012"
    found = run(hidden, weight, target, used, mode=mode, precision=precision, memory_bytes=num_bytes, **options)
    assert_close(found, run(hidden.double(), weight.double(), target, used, **options), gradient_error)
    assert found[4][options.get("valid_vocab", len(weight)) :].eq(0).all()


def test_what_is_kept_changes_nothing() -> None:
    """A second backward pass, which finds nothing kept, has the same bits; another number of blocks, other rounding."""
    hidden, weight, target = make(256, 700)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    results = []
    for num_bytes in (3 * 2 * 128 * 700 + MIB, 2 * 128 * 700 + 4 * 128 * 700):
        logprobs, _, entropy = linear_logprob(
            *inputs, target, entropy=True, precision=HALF, memory_bytes=num_bytes, temperature=0.8
        )
        loss = (logprobs + 0.1 * entropy).sum()  # type: ignore[operator]
        results += [torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2)]
    for mine, other in zip(results[0], results[2], strict=True):
        assert float((mine - other).float().norm() / mine.float().norm()) <= 4e-3
    for once, again in ((results[0], results[1]), (results[2], results[3])):
        assert all(torch.equal(mine, other) for mine, other in zip(once, again, strict=True))


@pytest.mark.parametrize("precision", [HALF, "fp8_grad"])
def test_accumulation_in_main_grad(precision: Any) -> None:
    hidden, weight, target = make(200, 300)
    for dtype in (torch.float32, torch.bfloat16):
        leaf = torch.nn.Parameter(weight)
        leaf.main_grad = torch.full_like(weight, 0.25, dtype=dtype)  # type: ignore[attr-defined]
        for _ in range(2):
            logprobs = linear_logprob(hidden, leaf, target, precision=precision, accumulate_main_grad=True)[0]
            logprobs.sum().backward()
        exact = weight.double().requires_grad_()
        (2 * linear_logprob_reference(hidden.double(), exact, target)[0].sum()).backward()
        assert exact.grad is not None and leaf.grad is None
        error = (leaf.main_grad - 0.25 - exact.grad).norm() / exact.grad.norm()  # type: ignore[attr-defined]
        assert float(error) <= (0.04 if precision == "fp8_grad" else 4e-3) and leaf.grad_added_to_main_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", [HALF, "fp8_grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_hidden_state_that_is_not_finite_is_reported(precision: Any, value: float) -> None:
    hidden, weight, target = make(40, 300)
    hidden[5, 3] = value
    found = run(hidden, weight, target, precision=precision)
    assert found[0].isnan().nonzero().tolist() == found[2].isnan().nonzero().tolist() == [[5]]
    assert found[3][5].isnan().all() and found[4].isnan().any()


@pytest.mark.parametrize("precision", [HALF, "fp8_grad"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(precision: Any, frozen: int) -> None:
    *inputs, target = make(150, 300)
    inputs[1 - frozen].requires_grad_()
    linear_logprob(*inputs, target, precision=precision)[0].sum().backward()
    exact = [part.detach().double().requires_grad_() for part in inputs]
    linear_logprob_reference(*exact, target)[0].sum().backward()
    found, wanted = inputs[1 - frozen].grad, exact[1 - frozen].grad
    assert inputs[frozen].grad is None and found is not None and wanted is not None
    assert float((found - wanted).norm() / wanted.norm()) <= (0.04 if precision == "fp8_grad" else 4e-3)


@pytest.mark.parametrize("precision", [HALF, "fp8_grad"])
def test_no_tokens(precision: Any) -> None:
    hidden, weight, target = make(10, 300)
    inputs = [hidden[:0].requires_grad_(), weight.requires_grad_()]
    logprobs = linear_logprob(*inputs, target[:0], precision=precision)[0]
    of_hidden, of_weight = torch.autograd.grad(logprobs.sum(), inputs)
    assert of_hidden.shape == (0, 48) and of_weight.eq(0).all()


CASES: list[dict[str, Any]] = [{}, {"temperature": 0.7, "valid_vocab": 150}, {"valid_vocab": 200}]


def vocabulary_rank(rank: int, folder: str) -> None:
    """With a third of the second rank's columns valid, none, or all; blocks of 128 tokens meet one another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    hidden, weight, target = make(200, 400)
    results = []
    for precision in (HALF, "fp8_grad"):
        for case in CASES:
            valid = target % case.get("valid_vocab", 400)
            part = weight.chunk(2)[rank]
            options: dict[str, Any] = {"precision": precision, "tp_group": dist.group.WORLD, "memory_bytes": 10**5}
            results.append(run(hidden, part, valid, **options, **case))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_vocabulary_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(vocabulary_rank, args=(str(tmp_path),), nprocs=2)
    first, second = torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt")
    hidden, weight, target = make(200, 400)
    wanted = [
        run(hidden.double(), weight.double(), target % case.get("valid_vocab", 400), **case) for case in CASES
    ] * 2
    for number, (exact, mine, other) in enumerate(zip(wanted, first, second, strict=True)):
        for index in range(4):  # outputs and the gradient of hidden are whole on both
            torch.testing.assert_close(mine[index], other[index], rtol=0, atol=0)
        whole = [*mine[:4], torch.cat([mine[4], other[4]])]
        assert_close(whole, exact, 0.045 if number >= len(CASES) else 4e-3)
