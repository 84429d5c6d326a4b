"""FP8 products against float64, through torch._scaled_mm on a CPU; the gate, and the way back to bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from megatron_oreal.kernels import linear_logprob, tiles
from megatron_oreal.kernels.fp8 import gemms as fp8
from megatron_oreal.kernels.fp8 import transformer_engine as fp8_te
from megatron_oreal.kernels.fp8.gate import Fp8Gate, GateReport, GuardedPrecision
from megatron_oreal.kernels.fp8.gemms import Fp8Gemms, QuantizedWeights, gathered_logits
from megatron_oreal.kernels.fp8.largest_logits import largest_columns
from megatron_oreal.kernels.fp8.scaled import Fp8Options, quantize, scaled_product
from megatron_oreal.kernels.gemms import PlainGemms, Precision
from megatron_oreal.kernels.precision import make_fp8_gemms, make_gemms, make_products

CPU = torch.device("cpu")
TOKENS, VOCABULARY, HIDDEN = 128, 2048, 256


def make_head(tokens: int = TOKENS, vocabulary: int = VOCABULARY, hidden: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """bf16 hidden states and weights whose logits, as a language model's, range from undecided to certain."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(vocabulary, hidden, generator=generator)
    states = 120 / hidden**0.5 * torch.randn(tokens, hidden, generator=generator)  # logits of deviation 2.4
    for share in (1.0, 0.8):  # a preferred token, and its rival
        chosen = weight[torch.randint(vocabulary, (tokens,), generator=generator)]
        gap = share * torch.linspace(2, 26, tokens)
        states += (gap / chosen.square().sum(1))[:, None] * chosen
    return states.bfloat16(), weight.bfloat16()


def defined_logits(gemms: Fp8Gemms, hidden: Tensor, weight: Tensor) -> Tensor:
    """[t, v] float64, what FP8 values are: the largest logits of each token exact, the others as FP8 has them."""
    logits = gemms.logits(hidden, weight)
    columns = logits.topk(min(gemms.num_exact, len(weight)), dim=1).indices
    return logits.scatter(1, columns, gathered_logits(hidden, weight, columns)).double()


def measured(options: Fp8Options, hidden: Tensor, weight: Tensor, exact_target: bool) -> GateReport:
    """Of eight tokens a row that the exact distribution drew."""
    exact = (hidden.float() @ weight.float().T).double()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(torch.softmax(exact, 1), 8, replacement=True, generator=generator)
    gemms = make_fp8_gemms(CPU, torch.bfloat16, with_values=True, options=options)
    logits = defined_logits(gemms, hidden, weight)
    target = (gathered_logits(hidden, weight, drawn) if exact_target else logits.gather(1, drawn)).double()
    logprobs = target - torch.logsumexp(logits, 1, keepdim=True)
    return Fp8Gate().measure(logprobs.flatten(), torch.log_softmax(exact, 1).gather(1, drawn).flatten())


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def make_gradient(hidden: Tensor, weight: Tensor) -> Tensor:
    """[t, v]: of a policy loss, an advantage a row times softmax minus the sampled token."""
    generator = torch.Generator().manual_seed(2)
    gradient = torch.softmax(hidden.float() @ weight.float().T, 1)
    drawn = torch.multinomial(gradient, 1, generator=generator)
    gradient.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=torch.float32))
    return gradient * torch.randn(len(hidden), 1, generator=generator) / len(hidden)


def test_quantizing_by_hand() -> None:
    """The largest value becomes 448; 3.3 times 448 / 7 = 211.2 is between the e4m3 values 208 and 224."""
    matrix = torch.tensor([[7.0, -3.3], [0.0, 0.0]])
    whole = quantize(matrix, per_row=False)
    assert whole.values.shape == (16, 16) and whole.values.dtype == torch.float8_e4m3fn
    assert whole.scale.item() == pytest.approx(7 / 448)
    assert whole.values[0, :2].float().tolist() == [448.0, -208.0]
    assert whole.values.float().abs().sum() == 448 + 208  # the padding is zero
    rows = quantize(torch.tensor([[7.0], [0.5], [0.0]]), per_row=True)
    assert rows.values[:3, 0].float().tolist() == [448.0, 448.0, 0.0]
    assert rows.scale.shape == (16, 1) and rows.scale[1].item() == pytest.approx(0.5 / 448)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize(("t", "v", "h"), [(1, 1, 1), (13, 250, 37), (32, 64, 48)])
def test_a_product_of_any_shape(t: int, v: int, h: int, per_row: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(t, h, generator=generator), torch.randn(v, h, generator=generator)
    found = scaled_product(quantize(left, per_row), quantize(right, per_row), fast=True)
    assert found.shape == (t, v) and found.dtype == torch.float32 and found.is_contiguous()
    # Each factor is off by at most 1 / 16, so a sum by at most 1 / 8 of its terms' sizes.
    assert ((found - left @ right.T).abs() <= 0.14 * (left.abs() @ right.abs().T)).all()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = make_head(40, 100, 24)
    gradient, results = make_gradient(hidden, weight).bfloat16(), []
    for num_bytes in (1, 2**30):
        monkeypatch.setattr(tiles, "CPU_BLOCK_BYTES", num_bytes)
        gemms, outs = make_fp8_gemms(CPU, torch.bfloat16, with_values=True), (torch.empty(40, 24), torch.empty(100, 24))
        gemms.grad_hidden(gradient, weight, outs[0], accumulate=False)
        gemms.grad_weight(gradient, hidden, outs[1], accumulate=False)
        logits = gemms.logits(hidden, weight)
        results.append((logits, *outs, gathered_logits(hidden, weight, largest_columns(logits, 4).sort(1).values)))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_within_four_percent(out_dtype: torch.dtype) -> None:
    hidden, weight = make_head()
    gradient = make_gradient(hidden, weight)
    gemms = make_fp8_gemms(CPU, torch.bfloat16, with_values=False)
    grad_hidden, grad_weight = torch.full((TOKENS, HIDDEN), torch.nan), torch.full_like(weight, torch.nan).to(out_dtype)
    gemms.grad_hidden(gradient.to(gemms.grad_dtype), weight, grad_hidden, accumulate=False)
    gemms.grad_weight(gradient.to(gemms.grad_dtype), hidden, grad_weight, accumulate=False)
    wanted_hidden, wanted_weight = gradient.double() @ weight.double(), gradient.double().T @ hidden.double()
    assert relative_error(grad_hidden, wanted_hidden) < 0.04
    assert relative_error(grad_weight, wanted_weight) < 0.04
    once = grad_weight.float().clone()
    gemms.grad_weight(gradient.to(gemms.grad_dtype), hidden, grad_weight, accumulate=True)
    gemms.grad_hidden(gradient.to(gemms.grad_dtype), weight, grad_hidden, accumulate=True)
    torch.testing.assert_close(grad_weight.float(), 2 * once, rtol=2**-8, atol=0)
    assert relative_error(grad_hidden, 2 * wanted_hidden) < 0.04


def test_with_fp8_gradients_alone_the_values_are_exact() -> None:
    hidden, weight = make_head()
    gemms = make_fp8_gemms(CPU, torch.bfloat16, with_values=False)
    logits = gemms.logits(hidden, weight)
    assert torch.equal(logits, make_gemms("bf16", CPU, torch.bfloat16).logits(hidden, weight))
    assert gemms.num_exact == 0 and gemms.exact_logits(hidden, weight, torch.zeros(TOKENS, 1).long()) is None


@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_exact_logits_decide_whether_fp8_values_pass(scaling: fp8.Scaling) -> None:
    """Plain FP8 fails every limit; the largest logits exact halve its error, the target's exact take away the rest."""
    hidden, weight = make_head()
    plain = measured(Fp8Options(scaling=scaling, num_exact=0), hidden, weight, exact_target=False)
    assert plain.reason.count(">") == 4
    rescored = measured(Fp8Options(scaling=scaling), hidden, weight, exact_target=False)
    assert rescored.mean_ratio - 1 < (plain.mean_ratio - 1) / 2 and rescored.mean_kl < plain.mean_kl / 2
    assert rescored.p99_difference > 0.1  # a sampled token of the tail
    whole = measured(Fp8Options(scaling=scaling), hidden, weight, exact_target=True)
    assert whole.passes and whole.mean_ratio < 1.005 and whole.p99_difference < 0.02 and whole.mean_kl < 1e-5


def make_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Undecided rows, of equal logits too; peaked ones; and logits of hundreds, where FP8 is wrong by tens."""
    hidden, weight = make_head(70, 500, 64)
    scale = torch.cat([torch.zeros(2), torch.full((8,), 0.01), torch.ones(50), torch.full((10,), 20.0)])
    generator = torch.Generator().manual_seed(3)
    return (scale[:, None] * hidden).bfloat16(), weight, torch.randint(0, 390, (70,), generator=generator)


class Fp8Values(Fp8Gemms):
    """FP8 in the values alone, so that the gradients show which values they are of; and without ties."""

    plain = PlainGemms(torch.float32)

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        left, right = (quantize(matrix, per_row=True) for matrix in (hidden, weight))
        product = (left.values.float() * left.scale) @ (right.values.float() * right.scale).T
        product = product[: len(hidden), : len(weight)]
        return product.contiguous() if out is None else out.copy_(product)

    @property
    def grad_dtype(self) -> torch.dtype:
        return torch.float32

    def grad_hidden(self, *inputs: Any, **options: Any) -> None:
        self.plain.grad_hidden(*inputs, **options)

    def grad_weight(self, *inputs: Any, **options: Any) -> None:
        self.plain.grad_weight(*inputs, **options)


def definition(logits: Tensor, exact: Tensor, weight: Tensor, hidden: Tensor, mode: str) -> list[Tensor]:
    """[t, v] of `defined_logits` over the temperature and the target's exact one, in float64: outputs and gradients."""
    logits = logits.clone().requires_grad_()
    logsumexp = torch.logsumexp(logits, 1)
    probs = torch.softmax(logits, 1)
    entropy = logsumexp - (probs * logits).sum(1)
    scale = token_scale(len(hidden)).double()
    loss = (scale * -logsumexp).sum() + (0.0 if mode == "eager" else (0.3 * logsumexp - 0.5 * scale * entropy).sum())
    (of_logits,) = torch.autograd.grad(loss, [logits])
    return [value.detach() for value in (exact - logsumexp, logsumexp, entropy, of_logits)]


def token_scale(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, generator=torch.Generator().manual_seed(5))


CASES: list[dict[str, Any]] = [{}, {"temperature": 0.7, "valid_vocab": 397}, {"temperature": 1.5, "valid_vocab": 431}]


def loss_of(outputs: tuple[Tensor, Tensor, Tensor | None], mode: str) -> Tensor:
    logprobs, logsumexp, entropy = outputs
    assert entropy is not None
    scale = token_scale(len(logprobs))
    return (scale * logprobs).sum() + (0.0 if mode == "eager" else (0.3 * logsumexp - 0.5 * scale * entropy).sum())


def found_and_wanted(
    num_exact: int, mode: str, group: dist.ProcessGroup | None = None, num_ranks: int = 1, **case: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs and gradients of linear_logprob, and of the definition: each rank has largest logits of its own."""
    hidden, weight, target = make_rows()
    gemms = Fp8Values(make_products(Fp8Options(), CPU), None, num_exact, is_cuda=False)
    valid, temperature = case.get("valid_vocab", len(weight)), case.get("temperature", 1.0)
    target %= valid
    parts = [defined_logits(gemms, hidden, part) for part in weight[:valid].split(len(weight) // num_ranks)]
    logits = torch.cat(parts, 1) / temperature
    exact = gathered_logits(hidden, weight, target[:, None])[:, 0].double() / temperature
    wanted = definition(logits, exact, weight, hidden, mode)
    of_logits = wanted.pop() / temperature
    of_logits[torch.arange(len(target)), target] += token_scale(len(target)) / temperature
    of_weight = torch.zeros_like(weight, dtype=torch.float64)
    of_weight[:valid] = of_logits.T @ hidden.double()
    wanted += [of_logits @ weight[:valid].double(), of_weight]
    rank = group.rank() if group else 0
    inputs = hidden.float().requires_grad_(), weight.chunk(num_ranks)[rank].float().requires_grad_()
    eager: dict[str, Any] = {"mode": mode, "token_scale": token_scale(len(target))} if mode == "eager" else {}
    outputs = linear_logprob(*inputs, target, entropy=True, precision=gemms, tp_group=group, **eager, **case)
    gradients = torch.autograd.grad(loss_of(outputs, mode), inputs)
    found = [*(output.detach() for output in outputs if output is not None), *gradients]
    return found, wanted, logits.abs().amax(1)


def assert_close(found: list[Tensor], wanted: list[Tensor], largest: Tensor) -> None:
    """A token to the float32 precision of its `largest` logit [t]."""
    allowed = 1e-6 * largest.clamp_min(1)
    for value, expected in zip(found[:3], wanted[:3], strict=True):
        assert ((value - expected).abs() <= allowed).all()
    assert ((found[3] - wanted[3]).norm(dim=1) <= 2 * allowed * wanted[3].norm(dim=1)).all()
    assert (found[4] - wanted[4]).norm() <= 1e-5 * wanted[4].norm()  # 0 where there is only padding


@pytest.mark.parametrize("mode", ["recompute", "eager"])
@pytest.mark.parametrize("limit", [1, 2_000_000, 10**9])
@pytest.mark.parametrize("num_exact", [7, 64])
@pytest.mark.parametrize("case", CASES)
def test_the_largest_logits_of_all_tiles_are_exact(
    monkeypatch: pytest.MonkeyPatch, mode: str, limit: int, num_exact: int, case: dict[str, Any]
) -> None:
    """In the values and in the gradients, with tiles narrower than their number, and kept ones; against float64."""
    monkeypatch.setattr(tiles, "CPU_BYTES", limit)
    monkeypatch.setattr(tiles, "CPU_BLOCK_BYTES", 10_000)
    assert_close(*found_and_wanted(num_exact, mode, **case))


def two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for limit in (1, 10**9):
        tiles.CPU_BYTES = limit
        for case in (*CASES, {"valid_vocab": 255}, {"valid_vocab": 250}):  # five columns of the second, and none
            for mode in ("recompute", "eager"):
                found, wanted, largest = found_and_wanted(16, mode, dist.group.WORLD, 2, **case)
                wanted[4] = wanted[4].chunk(2)[rank]
                assert_close(found, wanted, largest)
    dist.destroy_process_group()


def test_the_largest_logits_in_two_processes(tmp_path: Path) -> None:
    mp.spawn(two_ranks, args=(str(tmp_path),), nprocs=2)


def test_weight_rows_are_gathered_once_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """num_exact of them and the target's, however many tiles there are, and none in the backward pass."""
    monkeypatch.setattr(tiles, "CPU_BYTES", 50_000)
    gathered = []

    def counted(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
        gathered.append(columns.numel())
        return gathered_logits(hidden, weight, columns)

    monkeypatch.setattr(fp8, "gathered_logits", counted)
    hidden, weight, target = make_rows()
    logprobs = linear_logprob(hidden.requires_grad_(), weight, target, precision="fp8")[0]
    assert len(gathered) > 2 and sum(gathered) == 65 * len(target)
    logprobs.sum().backward()
    assert sum(gathered) == 65 * len(target)


def test_tokens_do_not_change_each_other() -> None:
    """With row scales a token's logits are the same bits, whatever else is in its chunk."""
    hidden, weight = make_head(33, 500, 64)
    gemms = make_fp8_gemms(CPU, torch.bfloat16, with_values=True)
    assert torch.equal(gemms.logits(hidden, weight)[5:20], gemms.logits(hidden[5:20] * 1.0, weight))


@pytest.mark.parametrize("with_values", [False, True])
def test_the_same_inputs_give_the_same_bits(with_values: bool) -> None:
    hidden, weight = make_head(64, 512, 64)
    gradient = make_gradient(hidden, weight).bfloat16()
    results = []
    for _ in range(2):
        gemms = make_fp8_gemms(CPU, torch.bfloat16, with_values)
        outs = [torch.empty(64, 64), torch.empty(512, 64)]
        gemms.grad_hidden(gradient, weight, outs[0], accumulate=False)
        gemms.grad_weight(gradient, hidden, outs[1], accumulate=False)
        results.append([gemms.logits(hidden, weight), *outs])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("rows", "columns", "count"), [(5, 1000, 3), (4, 4096, 64), (3, 70, 64), (2, 10, 64)])
def test_largest_columns(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, count: int) -> None:
    monkeypatch.setattr(tiles, "CPU_BLOCK_BYTES", 10_000)
    logits = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    logits[:, -1] += 100 * torch.arange(rows)  # beyond the last whole group
    found = largest_columns(logits, count)
    assert found.shape == (rows, min(count, columns))
    wanted = logits.topk(min(count, columns), dim=1).indices
    assert found.sort(1).values.tolist() == wanted.sort(1).values.tolist()


def test_gathered_logits_by_hand() -> None:
    hidden, weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert gathered_logits(hidden, weight, torch.tensor([[2, 0], [1, 2]])).tolist() == [[3.0, 1.0], [4.0, 7.0]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("scaling", ["tensor", "row"])
def test_what_is_not_finite_is_not_hidden(bad: float, scaling: fp8.Scaling) -> None:
    hidden, weight = make_head(16, 64, 32)
    hidden[3, 5] = bad
    logits = make_fp8_gemms(CPU, torch.bfloat16, True, Fp8Options(scaling=scaling)).logits(hidden, weight)
    assert not torch.logsumexp(logits[3], 0).isfinite()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("limit", [1, 10**9])
def test_a_hidden_state_that_is_not_finite_is_reported(monkeypatch: pytest.MonkeyPatch, bad: float, limit: int) -> None:
    monkeypatch.setattr(tiles, "CPU_BYTES", limit)
    hidden, weight, target = make_rows()
    hidden[5, 3] = bad
    logprobs, _, entropy = linear_logprob(hidden, weight, target, entropy=True, precision="fp8", temperature=0.5)
    assert entropy is not None
    assert logprobs.isnan().nonzero().tolist() == entropy.isnan().nonzero().tolist() == [[5]]


def test_a_part_of_a_weight_is_quantised_once() -> None:
    made: list[Tensor] = []

    def make(weight: Tensor) -> int:
        made.append(weight)
        return len(made)

    kept, weight = QuantizedWeights(max_bytes=100), torch.ones(4, 4)
    assert [kept.get("a", weight, make), kept.get("a", weight.detach(), make), kept.get("b", weight, make)] == [1, 1, 2]
    assert kept.get("a", weight[:2], make) == 3  # another part of it
    assert kept.num_bytes == 16 + 16 + 8


def test_what_does_not_fit_is_made_again() -> None:
    kept, parts = QuantizedWeights(max_bytes=32), torch.ones(3, 4, 4).unbind()
    made: list[Tensor] = []
    for part in parts * 2:
        kept.get("a", part, made.append)
    assert kept.num_bytes == 32
    assert [part.data_ptr() for part in made] == [part.data_ptr() for part in (*parts, parts[2])]


def test_tiles_suit_every_kind_of_scales() -> None:
    assert tiles.ALIGNMENT % fp8.ALIGNMENT == 0
    assert all(tiles.ALIGNMENT % alignment == 0 for alignment in fp8_te.ALIGNMENT.values())


def test_a_loss_with_fp8_gradients() -> None:
    """The log-probs of the default, and its gradients within 4 %."""
    hidden, weight = (tensor.requires_grad_() for tensor in make_head())
    generator = torch.Generator().manual_seed(2)
    target = torch.multinomial(torch.softmax(hidden.float() @ weight.float().T, 1), 1, generator=generator)[:, 0]
    advantages = torch.randn(TOKENS, generator=generator)
    results = {}
    precisions: tuple[Precision, ...] = ("bf16", "fp8_grad", "fp8")
    for precision in precisions:
        logprobs, _, entropy = linear_logprob(hidden, weight, target, precision=precision, entropy=True)
        grads = torch.autograd.grad((advantages * logprobs).sum(), [hidden, weight])
        assert entropy is not None
        results[precision] = (logprobs.detach(), entropy.detach(), *grads)
    assert torch.equal(results["bf16"][0], results["fp8_grad"][0])
    for precision in precisions[1:]:
        for found, wanted in zip(results[precision][2:], results["bf16"][2:], strict=True):
            assert relative_error(found, wanted) < (0.04 if precision == "fp8_grad" else 0.06)
    torch.testing.assert_close(results["fp8"][1], results["bf16"][1], rtol=0, atol=0.05)


# The gate.


def test_the_gate_by_hand() -> None:
    """Ratios 1.1, 1, 1 and 0.5: the mean of exp|d| is (1.1 + 1 + 1 + 2) / 4; one of four is outside [.8, 1.2]."""
    ratios = torch.tensor([1.1, 1.0, 1.0, 0.5], dtype=torch.float64)
    bf16 = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    report = Fp8Gate().measure(bf16 + ratios.log(), bf16)
    assert report.num_tokens == 4
    assert report.mean_ratio == pytest.approx(5.1 / 4)
    assert report.p99_difference == pytest.approx(torch.tensor(2.0).log().item())
    assert report.outside_share == 0.25
    kl = sum(ratio - 1 - float(torch.tensor(ratio).log()) for ratio in (1.1, 0.5)) / 4
    assert report.mean_kl == pytest.approx(kl)
    assert not report.passes and "\n" not in report.reason
    assert report.reason.startswith("mean exp|d| 1.27 > 1.03, p99 |d| 0.693 > 0.2, mean KL")
    assert "share outside [0.8, 1.2] 0.25 > 0.005" in report.reason


def test_small_differences_pass_and_each_limit_counts() -> None:
    bf16 = torch.full((1000,), -2.0)
    difference = 0.01 * torch.ones(1000) * torch.tensor([1.0, -1.0]).repeat(500)
    assert Fp8Gate().measure(bf16 + difference, bf16).passes
    for limit in ("max_mean_ratio", "max_p99_difference", "max_mean_kl"):
        report = Fp8Gate(**{limit: 1e-6}).measure(bf16 + difference, bf16)
        assert not report.passes and report.reason.count(">") == 1
    report = Fp8Gate(clip_high=1.005).measure(bf16 + difference, bf16)
    assert report.reason == "share outside [0.8, 1.005] 0.5 > 0.005"


def test_log_probs_that_are_not_finite_never_pass() -> None:
    bf16 = torch.zeros(3)
    for value in (torch.nan, -torch.inf):
        assert not Fp8Gate().measure(torch.tensor([0.0, 0.0, value]), bf16).passes


def test_the_gate_needs_the_same_tokens() -> None:
    with pytest.raises(ValueError, match=r"same tokens, got \(2,\) and \(3,\)"):
        Fp8Gate().measure(torch.zeros(2), torch.zeros(3))


def test_it_falls_back_once_with_a_reason_and_stays() -> None:
    error, asked = 0.01, []

    def logprobs(precision: str, tokens: slice) -> Tensor:
        asked.append((precision, tokens))
        return torch.full((tokens.stop,), -1.0 + (error if precision == "fp8" else 0.0))

    guarded = GuardedPrecision(every=3, max_tokens=5)
    assert guarded.check(0, logprobs) is None and not asked  # nothing to measure on: not counted
    assert [guarded.check(9, logprobs) for _ in range(3)] == [None] * 3
    assert asked == [("fp8", slice(0, 5)), ("bf16", slice(0, 5))] and guarded.precision == "fp8"
    error = 0.5
    note = guarded.check(4, logprobs)
    assert note is not None and note.startswith("fp8 log-probs failed on 4 tokens (mean exp|d| 1.65 > 1.03")
    assert note.endswith("bf16 from now on") and "\n" not in note
    assert guarded.precision == "bf16" and guarded.report is not None and not guarded.report.passes
    assert guarded.check(4, logprobs) is None and len(asked) == 4  # no further measurement


def test_fp8_itself_falls_back_through_the_guard() -> None:
    hidden, weight = make_head()
    hidden = 2 * hidden  # and twice the error
    exact, generator = hidden.float() @ weight.float().T, torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.softmax(exact / 2, 1), 1, generator=generator)

    def logprobs(precision: Precision, tokens: slice) -> Tensor:
        gemms = make_fp8_gemms(CPU, torch.bfloat16, precision == "fp8", Fp8Options(num_exact=0))
        return torch.log_softmax(gemms.logits(hidden[tokens], weight), 1).gather(1, drawn[tokens])[:, 0]

    guarded = GuardedPrecision()
    note = guarded.check(TOKENS, logprobs)
    assert note is not None and note.count(">") == 4 and guarded.precision == "bf16"


# What is missing is named.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Fp8Options(scaling="block"), "'block' needs the transformer_engine backend"),
        (Fp8Options(scaling="mx"), "'mx' needs the transformer_engine backend"),
        (Fp8Options("transformer_engine", "row"), "'row' needs the torch backend"),
        (Fp8Options("transformer_engine", "tensor"), "needs an NVIDIA GPU of compute capability >= 8.9: use bf16"),
        (Fp8Options("transformer_engine", "block"), "needs an NVIDIA GPU of compute capability >= 9.0: use bf16"),
        (Fp8Options("transformer_engine", "mx"), "needs an NVIDIA GPU of compute capability >= 10.0: use bf16"),
    ],
)
def test_what_is_missing_is_named(options: Fp8Options, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_fp8_gemms(CPU, torch.bfloat16, with_values=True, options=options)
    assert "\n" not in str(error.value)
