"""FP8 products against float64, through torch._scaled_mm on a CPU; the gate, and the way back to bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_oreal.kernels import fp8, linear_logprob
from megatron_oreal.kernels.fp8 import (
    Fp8Gemms,
    Fp8Options,
    QuantizedWeights,
    gathered_logits,
    largest_columns,
    quantize,
    scaled_product,
)
from megatron_oreal.kernels.fp8_gate import Fp8Gate, GateReport, GuardedPrecision
from megatron_oreal.kernels.gemms import Precision, make_gemms

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


def measured(options: Fp8Options, hidden: Tensor, weight: Tensor, exact_target: bool) -> GateReport:
    """Of eight tokens a row that the exact distribution drew."""
    gemms = Fp8Gemms(CPU, torch.bfloat16, with_values=True, options=options)
    exact = (hidden.float() @ weight.float().T).double()
    generator = torch.Generator().manual_seed(1)
    drawn = torch.multinomial(torch.softmax(exact, 1), 8, replacement=True, generator=generator)
    logits = gemms.logits(hidden, weight).double()
    target = logits.gather(1, drawn)
    if exact_target:
        columns = [gemms.exact_logits(hidden, weight, column) for column in drawn.unbind(1)]
        target = torch.stack([column.double() for column in columns if column is not None], dim=1)
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
    gradient, gemms = make_gradient(hidden, weight).bfloat16(), Fp8Gemms(CPU, torch.bfloat16, with_values=True)
    results = []
    for num_bytes in (1, 2**30):
        monkeypatch.setattr(fp8, "BLOCK_BYTES", num_bytes)
        gemms.weights.clear()
        out = torch.empty(100, 24)
        gemms.grad_weight(gradient, hidden, out, accumulate=False)
        results.append((gemms.logits(hidden, weight), out))
    for small, large in zip(*results, strict=True):
        assert torch.equal(small, large)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_within_four_percent(out_dtype: torch.dtype) -> None:
    hidden, weight = make_head()
    gradient = make_gradient(hidden, weight)
    gemms = Fp8Gemms(CPU, torch.bfloat16, with_values=False)
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
    gemms = Fp8Gemms(CPU, torch.bfloat16, with_values=False)
    logits = gemms.logits(hidden, weight)
    assert torch.equal(logits, make_gemms("bf16", CPU, torch.bfloat16).logits(hidden, weight))
    assert gemms.exact_logits(hidden, weight, torch.zeros(TOKENS, dtype=torch.int64)) is None


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


def test_the_largest_logits_are_exact_and_the_others_are_not() -> None:
    hidden, weight = make_head()
    exact = hidden.float() @ weight.float().T
    gemms = Fp8Gemms(CPU, torch.bfloat16, with_values=True)
    logits = gemms.logits(hidden, weight)
    is_exact = torch.isclose(logits, exact, rtol=1e-5, atol=1e-5)
    assert is_exact.gather(1, exact.argmax(1, keepdim=True)).all()
    assert is_exact.sum(1).min() >= 64 and is_exact.double().mean() < 0.1
    lowest = exact.argmin(1)
    found = gemms.exact_logits(hidden, weight, lowest)
    assert found is not None
    torch.testing.assert_close(found, exact.gather(1, lowest[:, None])[:, 0])


def test_tokens_do_not_change_each_other() -> None:
    """With row scales a token's logits are the same bits, whatever else is in its chunk."""
    hidden, weight = make_head(33, 500, 64)
    gemms = Fp8Gemms(CPU, torch.bfloat16, with_values=True)
    assert torch.equal(gemms.logits(hidden, weight)[5:20], gemms.logits(hidden[5:20] * 1.0, weight))


@pytest.mark.parametrize("with_values", [False, True])
def test_the_same_inputs_give_the_same_bits(with_values: bool) -> None:
    hidden, weight = make_head(64, 512, 64)
    gradient = make_gradient(hidden, weight).bfloat16()
    results = []
    for _ in range(2):
        gemms = Fp8Gemms(CPU, torch.bfloat16, with_values)
        outs = [torch.empty(64, 64), torch.empty(512, 64)]
        gemms.grad_hidden(gradient, weight, outs[0], accumulate=False)
        gemms.grad_weight(gradient, hidden, outs[1], accumulate=False)
        results.append([gemms.logits(hidden, weight), *outs])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize(("rows", "columns", "count"), [(5, 1000, 3), (4, 4096, 64), (3, 70, 64), (2, 10, 64)])
def test_largest_columns(rows: int, columns: int, count: int) -> None:
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
    logits = Fp8Gemms(CPU, torch.bfloat16, True, Fp8Options(scaling=scaling)).logits(hidden, weight)
    assert not torch.logsumexp(logits[3], 0).isfinite()


def test_a_weight_is_quantised_once_a_version() -> None:
    made = []

    def make(weight: Tensor) -> int:
        made.append(weight)
        return len(made)

    kept, weight = QuantizedWeights(), torch.ones(4, 4)
    assert [kept.get("a", weight, make), kept.get("a", weight.detach(), make), kept.get("b", weight, make)] == [1, 1, 2]
    assert kept.get("a", weight[:2], make) == 3  # another part of it
    weight.add_(1)
    assert [kept.get("a", weight, make), kept.get("a", weight, make)] == [4, 4]
    kept.clear()
    assert kept.get("a", weight, make) == 5


def test_what_is_gone_is_forgotten() -> None:
    kept, weight = QuantizedWeights(), torch.ones(4, 4)
    kept.get("a", weight, Tensor.clone)
    del weight
    kept.get("a", torch.ones(2, 2), Tensor.clone)
    assert kept.num_bytes == 4


def test_a_storage_that_moved_is_quantised_again() -> None:
    kept, weight = QuantizedWeights(), torch.ones(4, 4)
    made: list[Tensor] = []
    kept.get("a", weight, made.append)
    storage, held = weight.untyped_storage(), []
    first = weight.data_ptr()
    while weight.data_ptr() == first:
        storage.resize_(0)
        held.append(torch.empty(4, 4))  # takes the place that was given up
        storage.resize_(64)
    kept.get("a", weight, made.append)
    assert len(made) == 2 and kept.num_bytes == 16


def test_what_does_not_fit_is_made_again() -> None:
    kept, parts = QuantizedWeights(max_bytes=32), torch.ones(3, 4, 4).unbind()
    made: list[Tensor] = []
    for part in parts * 2:
        kept.get("a", part, made.append)
    assert kept.num_bytes == 32
    assert [part.data_ptr() for part in made] == [part.data_ptr() for part in (*parts, parts[2])]


def test_a_frozen_weight_is_kept_between_calls() -> None:
    hidden, weight = make_head(16, 64, 32)
    before = fp8.FROZEN_WEIGHTS.num_bytes
    first = Fp8Gemms(CPU, torch.bfloat16, with_values=True, frozen=True).logits(hidden, weight)
    assert fp8.FROZEN_WEIGHTS.num_bytes == before + weight.numel()
    assert torch.equal(first, Fp8Gemms(CPU, torch.bfloat16, True, frozen=True).logits(hidden, weight))
    assert fp8.FROZEN_WEIGHTS.num_bytes == before + weight.numel()
    with torch.no_grad():
        weight.mul_(2)
    doubled = Fp8Gemms(CPU, torch.bfloat16, True, frozen=True).logits(hidden, weight)
    assert torch.equal(doubled, 2 * first)
    fp8.FROZEN_WEIGHTS.clear()


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
        gemms = Fp8Gemms(CPU, torch.bfloat16, precision == "fp8", Fp8Options(num_exact=0))
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
        Fp8Gemms(CPU, torch.bfloat16, with_values=True, options=options)
    assert "\n" not in str(error.value)
