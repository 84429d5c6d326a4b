"""Weights against definitions in plain Python, and the induced h against enumeration of all 2^M outcomes."""

import itertools
import math
import random
import warnings
from collections.abc import Callable, Sequence
from statistics import mean, pstdev, stdev
from typing import Any

import numpy as np
import pytest
import torch

from megatron_oreal.algorithms.objectives import OBJECTIVES, h_prime, h_value, sample_weights, weights
from megatron_oreal.algorithms.oreal import select_sequences
from megatron_oreal.config import OrealConfig
from megatron_oreal.types import Group, Message, Prompt, Sample, Verdict

PASS_RATES = (0.03, 0.2, 0.5, 0.77, 0.98)
SIZES = (2, 3, 5, 8)
Outcomes = Sequence[int]  # 1 or 0 for each of the M samples


def ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if numerator else 0.0


def rloo(outcomes: Outcomes) -> list[float]:
    return [r - mean([other for j, other in enumerate(outcomes) if j != i]) for i, r in enumerate(outcomes)]


def grpo(deviation: Callable[[Outcomes], float], epsilon: float) -> Callable[[Outcomes], list[float]]:
    return lambda outcomes: [ratio(r - mean(outcomes), deviation(outcomes) + epsilon) for r in outcomes]


def pass_at_n(n: int) -> Callable[[Outcomes], list[float]]:
    """n times the share of the n-1 others' choices that are all wrong: the probability that the sample matters."""

    def weigh(outcomes: Outcomes) -> list[float]:
        found = []
        for i, r in enumerate(outcomes):
            others = [other for j, other in enumerate(outcomes) if j != i]
            found.append(r * n * mean([float(not any(c)) for c in itertools.combinations(others, n - 1)]))
        return found

    return weigh


def both_kinds(outcomes: Outcomes) -> list[float]:
    """Rejection sampling of the correct, and against the incorrect."""
    size, correct = len(outcomes), sum(outcomes)
    return [size / correct if r else -size / (size - correct) for r in outcomes]


def reference_pair(outcomes: Outcomes, eta: float = 0.5) -> list[float]:
    size, correct = len(outcomes), sum(outcomes)
    if correct in (0, size):
        return [0.0] * size
    advantages = rloo([2 * r - 1 for r in outcomes])
    return [
        x * size / correct if r else eta * x * size / (size - correct)
        for r, x in zip(outcomes, advantages, strict=True)
    ]


def paper_pair(outcomes: Outcomes, eta: float = 0.5) -> list[float]:
    size, correct = len(outcomes), sum(outcomes)
    if correct in (0, size):
        return [0.0] * size
    return [size / correct if r else -eta * (1 - correct / size) * size / (size - correct) for r in outcomes]


# name, options, weights by definition. Where only b - a is defined, any weights of the same expectation.
CASES: list[tuple[str, dict[str, Any], Callable[[Outcomes], list[float]]]] = [
    ("reinforce", {}, lambda outcomes: [float(r) for r in outcomes]),
    ("rloo", {}, rloo),
    ("rejection_sampling", {}, lambda outcomes: [ratio(r * len(outcomes), sum(outcomes)) for r in outcomes]),
    ("grpo", {}, grpo(pstdev, 0.0)),
    ("grpo", {"epsilon": 0.1}, grpo(pstdev, 0.1)),
    ("grpo", {"std": "bessel"}, grpo(stdev, 0.0)),
    ("grpo", {"std": "bessel", "epsilon": 1e-6}, grpo(stdev, 1e-6)),
    ("grpo", {"std": "none"}, grpo(lambda _: 1.0, 0.0)),
    ("pass_at_n", {"n": 1, "baseline": "none"}, pass_at_n(1)),
    ("pass_at_n", {"n": 2, "baseline": "none"}, pass_at_n(2)),
    ("pass_at_n", {"n": 2}, pass_at_n(2)),
    ("logit", {}, both_kinds),
    ("logit", {"baseline": "none"}, both_kinds),
    ("oreal_reference", {}, reference_pair),
    ("oreal_reference", {"negative_coef": 2.0}, lambda outcomes: reference_pair(outcomes, 2.0)),
    (
        "oreal_reference_all",
        {},
        lambda outcomes: [x if x > 0 else 0.5 * x for x in rloo([2 * r - 1 for r in outcomes])],
    ),
    ("oreal_paper", {}, paper_pair),
    ("oreal_paper", {"negative_coef": 1.0}, lambda outcomes: paper_pair(outcomes, 1.0)),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options, _ in CASES]


def enumerated_update(weigh: Callable[[Outcomes], list[float]], size: int, t: float) -> float:
    """E[(1/M) sum_i Z_i d log P(R_i) / dt] over all outcomes of M samples that are correct with probability t."""
    total = 0.0
    for outcomes in itertools.product((0, 1), repeat=size):
        probability = math.prod(t if r else 1 - t for r in outcomes)
        update = sum(z * (1 / t if r else -1 / (1 - t)) for z, r in zip(weigh(outcomes), outcomes, strict=True))
        total += probability * update / size
    return total


def table_weights(a: torch.Tensor, b: torch.Tensor) -> Callable[[Outcomes], list[float]]:
    def weigh(outcomes: Outcomes) -> list[float]:
        return [float(b[sum(outcomes) - 1] if r else a[sum(outcomes)]) for r in outcomes]

    return weigh


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "options", "weigh"), CASES, ids=IDS)
def test_the_induced_derivative_is_that_of_the_enumerated_expectation(
    name: str, options: dict[str, Any], weigh: Callable[[Outcomes], list[float]], size: int
) -> None:
    a, b = weights(name, size, **options)
    assert a.dtype == b.dtype == torch.float64 and a.shape == b.shape == (size,)
    for t in PASS_RATES:
        expected = enumerated_update(weigh, size, t)
        assert h_prime(a, b, t).item() == pytest.approx(expected, abs=1e-9)
        assert enumerated_update(table_weights(a, b), size, t) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "options", "weigh"), CASES, ids=IDS)
def test_each_sample_has_the_weight_of_its_definition(
    name: str, options: dict[str, Any], weigh: Callable[[Outcomes], list[float]], size: int
) -> None:
    outcomes = list(itertools.product((0, 1), repeat=size))
    found = sample_weights(name, torch.tensor(outcomes), **options)
    assert found.dtype == torch.float64
    table = table_weights(*weights(name, size, **options))
    assert found.tolist() == [table(row) for row in outcomes]
    if name == "logit" or (name == "pass_at_n" and "baseline" not in options):
        return
    torch.testing.assert_close(
        found, torch.tensor([weigh(row) for row in outcomes], dtype=torch.float64), rtol=0, atol=1e-12
    )


def power_sum(t: float, size: int) -> float:
    """(1 - (1-t)^M) / t"""
    return (1 - (1 - t) ** size) / t


CLOSED: dict[str, Callable[[int, float], float]] = {
    "reinforce": lambda size, t: 1.0,
    "rloo": lambda size, t: 1.0,
    "rejection_sampling": lambda size, t: power_sum(t, size),
    "pass_at_n": lambda size, t: 2 * (1 - t),
    "logit": lambda size, t: power_sum(t, size) + power_sum(1 - t, size),
    "oreal_reference": lambda size, t: (
        2 * size / (size - 1) * (power_sum(t, size) - 1 + 0.5 * (power_sum(1 - t, size) - 1))
    ),
    "oreal_reference_all": lambda size, t: 2 * (1 - t) + t,
    "oreal_paper": lambda size, t: power_sum(t, size) - t ** (size - 1) + 0.5 * (1 - (1 - t) ** (size - 1)),
}


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str) -> None:
    for size in (*SIZES, 64):
        a, b = weights(name, size)
        for t in PASS_RATES:
            assert h_prime(a, b, t).item() == pytest.approx(CLOSED[name](size, t), abs=1e-9)


def test_values_are_the_integrals_of_derivatives() -> None:
    for size in (1, 5, 64):
        a, b = weights("rejection_sampling", size)
        for t in PASS_RATES:
            expected = sum((1 - (1 - t) ** k) / k for k in range(1, size + 1))
            assert h_value(a, b, t).item() == pytest.approx(expected, abs=1e-9)
    for name, options, _ in CASES:
        a, b = weights(name, 6, **options)
        t = torch.tensor(PASS_RATES, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(h_value(a, b, t).sum(), t)
        torch.testing.assert_close(slope, h_prime(a, b, t.detach()), rtol=0, atol=1e-9)
        assert h_value(a, b, 0.0) == 0
    a, b = weights("pass_at_n", 9, n=4)
    assert h_value(a, b, 0.3).item() == pytest.approx(1 - 0.7**4, abs=1e-12)


def test_tables_by_hand() -> None:
    expected: dict[str, tuple[list[float], list[float]]] = {
        "reinforce": ([0, 0, 0], [1, 1, 1]),
        "rloo": ([0, -1 / 2, -1], [1, 1 / 2, 0]),
        "rejection_sampling": ([0, 0, 0], [3, 3 / 2, 1]),
        "grpo": ([0, -(0.5**0.5), -(2**0.5)], [2**0.5, 0.5**0.5, 0]),
        "pass_at_n": ([0, -1 / 2, 0], [2, 1 / 2, 0]),  # n = 2, d = 2, 1, 0
        "logit": ([0, -3 / 2, -4], [4, 3 / 2, 0]),  # d = 4, 3, 4
        "oreal_reference": ([0, -3 / 4, -3], [6, 3 / 2, 0]),
        "oreal_reference_all": ([0, -1 / 2, -1], [2, 1, 0]),
        "oreal_paper": ([0, -1 / 2, -1 / 2], [3, 3 / 2, 0]),
    }
    assert {*expected, "expression"} == set(OBJECTIVES)
    for name, (a, b) in expected.items():
        found_a, found_b = weights(name, 3)
        assert found_a.tolist() == pytest.approx(a, abs=1e-12), name
        assert found_b.tolist() == pytest.approx(b, abs=1e-12), name


def test_h_prime_takes_any_shape() -> None:
    a, b = weights("grpo", 4)
    t = torch.rand(2, 3, dtype=torch.float64)
    found = h_prime(a, b, t)
    assert found.shape == (2, 3) and h_prime(a, b, 0.25).shape == ()
    assert found[1, 2] == h_prime(a, b, float(t[1, 2]))
    assert h_prime(a, b, 0.0) == b[0] - a[0] and h_prime(a, b, 1.0) == b[-1] - a[-1]
    with pytest.raises(ValueError, match=r"t must be in \[0, 1\]"):
        h_prime(a, b, 1.01)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("grpo", lambda t: 1 / math.sqrt(t * (1 - t))),
        ("logit", lambda t: 1 / (t * (1 - t))),
        ("rejection_sampling", lambda t: 1 / t),
        ("oreal_reference", lambda t: 2 * (1 - t) / t + t / (1 - t)),
        ("oreal_paper", lambda t: 1 / t + 0.5),
    ],
)
def test_large_groups_approach_the_limits(name: str, limit: Callable[[float], float]) -> None:
    a, b = weights(name, 1024)
    for t in (0.1, 0.5, 0.9):
        assert h_prime(a, b, t).item() == pytest.approx(limit(t), rel=0.02)


@pytest.mark.parametrize(("name", "options"), [("logit", {}), ("pass_at_n", {"n": 2}), ("expression", {"h": "t"})])
@pytest.mark.parametrize("pass_rate", [0.5, 0.8])  # not below 1/M, where the others say little
def test_the_leave_one_out_split_has_the_same_expectation_and_less_variance(
    name: str, options: dict[str, Any], pass_rate: float
) -> None:
    """A softmax over five correct and five incorrect answers, three samples: all 1000 draws."""
    policy = torch.tensor([pass_rate / 5] * 5 + [(1 - pass_rate) / 5] * 5, dtype=torch.float64)
    scores = torch.eye(10, dtype=torch.float64) - policy  # row y: the gradient of log pi(y) by the logits
    draws = torch.tensor(list(itertools.product(range(10), repeat=3)))
    probability = policy[draws].prod(dim=1)

    def moments(baseline: str) -> tuple[torch.Tensor, float]:
        z = sample_weights(name, (draws < 5).long(), baseline=baseline, **options)
        updates = (z[..., None] * scores[draws]).mean(dim=1)
        return probability @ updates, float(probability @ updates.square().sum(dim=1))

    (split, split_square), (plain, plain_square) = moments("leave_one_out"), moments("none")
    torch.testing.assert_close(split, plain, rtol=0, atol=1e-12)
    a, b = weights(name, 3, **options)
    ascent = (policy[:5, None] * scores[:5]).sum(dim=0)  # the gradient of the pass rate
    torch.testing.assert_close(split, h_prime(a, b, pass_rate) * ascent, rtol=0, atol=1e-12)
    assert split_square < plain_square


# --- any h


def bernstein_by_definition(h: Callable[[float], float], size: int, t: float) -> float:
    return sum(h(k / size) * math.comb(size, k) * t**k * (1 - t) ** (size - k) for k in range(size + 1))


@pytest.mark.parametrize("size", SIZES)
def test_any_h_becomes_its_bernstein_polynomial(size: int) -> None:
    delta = 1 / (2 * size)

    def smoothed(t: float) -> float:
        return math.log((t + delta) / (1 - t + delta))

    for a, b in (
        weights("expression", size, h="log(t / (1 - t))", smoothing=delta),
        weights(lambda t: math.log(t / (1 - t)), size, smoothing=delta),
        weights(smoothed, size),
    ):
        d = [size * (smoothed((s + 1) / size) - smoothed(s / size)) for s in range(size)]
        assert (b - a).tolist() == pytest.approx(d, abs=1e-9)
        for t in PASS_RATES:
            expected = bernstein_by_definition(smoothed, size, t) - smoothed(0.0)
            assert h_value(a, b, t).item() == pytest.approx(expected, abs=1e-9)
            assert enumerated_update(table_weights(a, b), size, t) == pytest.approx(h_prime(a, b, t).item(), abs=1e-9)


FUNCTIONS: dict[str, Callable[[float], float]] = {
    "t": lambda t: t,
    " p ": lambda t: t,
    "2*t - t^2": lambda t: 2 * t - t * t,
    "2 t".replace(" ", "*"): lambda t: 2 * t,
    "-(1 - t)**3": lambda t: -((1 - t) ** 3),
    "--t": lambda t: t,
    "-2^-t": lambda t: -(2**-t),
    "t^2^2": lambda t: t**4,
    "t/2/4": lambda t: t / 8,
    "1 - 2 - 3 + t": lambda t: t - 4,
    "2*asin(sqrt(t))": lambda t: 2 * math.asin(math.sqrt(t)),
    "log(t + 1e-3) / log(10)": lambda t: math.log10(t + 1e-3),
    "exp(.5*t) + sin(t) - cos(t) + tan(t)": lambda t: math.exp(t / 2) + math.sin(t) - math.cos(t) + math.tan(t),
    "-acos(t) + atan(3.*t) + sinh(t) + cosh(t) + tanh(t)": lambda t: (
        -math.acos(t) + math.atan(3 * t) + math.sinh(t) + math.cosh(t) + math.tanh(t)
    ),
    "min(t, 0.5) + max(t, .25, t^2) + abs(t - 1) + t": lambda t: min(t, 0.5) + max(t, 0.25, t * t) + abs(t - 1) + t,
    "pi*t": lambda t: math.pi * t,
}


@pytest.mark.parametrize("text", FUNCTIONS)
def test_expressions_mean_what_they_say(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a, b = weights("expression", 7, h=text)
    h = FUNCTIONS[text]
    assert (b - a).tolist() == pytest.approx([7 * (h((s + 1) / 7) - h(s / 7)) for s in range(7)], abs=1e-12)


@pytest.mark.parametrize("h", [math.sqrt, torch.sqrt, np.sqrt, "sqrt(t)", "t^0.5", "t^(1/2)"])
def test_callables_of_any_library(h: Any) -> None:
    a, b = weights("expression", 4, h=h) if isinstance(h, str) else weights(h, 4)
    assert (b - a).tolist() == pytest.approx([4 * (((s + 1) / 4) ** 0.5 - (s / 4) ** 0.5) for s in range(4)])
    rewards = torch.tensor([[1, 0, 1, 0]])
    objective = "expression" if isinstance(h, str) else h
    found = sample_weights(objective, rewards, **({"h": h} if isinstance(h, str) else {}))
    assert found[0].tolist() == [b[1], a[2], b[1], a[2]]


@pytest.mark.parametrize(
    ("h", "message"),
    [
        ("", "h is empty"),
        ("__import__('os').system('true')", r"h: '_' at character 1 is not in the grammar"),
        ("t.real", r"h: '\.' at character 2"),
        ("lambda t: t", r"h: ':' at character 9"),
        ("lambda t", r"h: 'lambda' at character 1"),
        ("open(t)", r"h: 'open' at character 1"),
        ("t; t", r"h: ';' at character 2"),
        ("t if t else 1", r"h: 'if' at character 3"),
        ("[t][0]", r"h: '\[' at character 1"),
        ("t @ t", r"h: '@' at character 3"),
        ("t // 2", r"h: '/' at character 4"),
        ("t t", r"h: 't' at character 3"),
        ("2t", r"h: 't' at character 2"),
        ("x", r"h: 'x' at character 1"),
        ("t\n+ 1", r"h: '\\n' at character 2"),
        ("𝚝", "is not in the grammar"),
        ("t + ٣", "h: '٣' at character 5"),
        ("log(t", "h ends too early"),
        ("log()", r"h: '\)' at character 5"),
        ("log", "h ends too early"),
        ("t +", "h ends too early"),
        (")t", r"h: '\)' at character 1"),
        ("log(t, 2)", "h: log at character 1 takes 1 arguments, got 2"),
        ("max(t)", "h: max at character 1 takes two or more arguments, got 1"),
        ("1e999 * t", "h: the number at character 1 is too large"),
        ("t" + "+t" * 300, "h has 601 characters"),
        ("(" * 100 + "t" + ")" * 100, "h is nested more than 40 deep"),
        ("-" * 100 + "t", "h is nested more than 40 deep"),
        ("^".join("t" * 100), "h is nested more than 40 deep"),
        ("1 + 2", r"h='1 \+ 2' does not depend on t"),
        ("log(t)", r"h diverges or has no real value at t=0: set smoothing, for example 1/\(2 group_size\) = 0\.125"),
        ("log(1 - t)", r"h diverges or has no real value at t=1: set smoothing"),
        ("t^-1", r"h diverges or has no real value at t=0: set smoothing"),
        ("1 / (1 - 2*t)", r"h diverges or has no real value at t=0\.5: write one that is finite"),
        ("sqrt(t - 0.5)", r"h diverges or has no real value at t=0: write one that is finite"),
        ("exp(exp(exp(9*t)))", "h diverges or has no real value at t=0.21: write one"),
        ("10^10^10^10 * t", "h diverges or has no real value at t=0: write one"),
    ],
)
def test_an_h_outside_the_grammar_or_the_numbers_is_refused_in_one_line(h: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        weights("expression", 4, h=h)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("h", [lambda t: math.log(t), lambda t: 1 / t, np.log, torch.log, lambda t: t**-1.5])
def test_a_callable_that_diverges_needs_smoothing(h: Callable[[Any], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's word on log(0)
        with pytest.raises(ValueError, match=r"at t=0: set smoothing, for example 1/\(2 group_size\) = 0\.0625"):
            weights(h, 8)


@pytest.mark.parametrize(
    ("h", "where"),
    [
        ("t*(1-t)", "from t=0.5 to t=1;"),
        ("-t", "from t=0 to t=1;"),
        ("sin(9*t)", "from t=0.175 to t=0.525, from t=0.875 to t=1;"),
        (lambda t: abs(t - 0.25), "from t=0 to t=0.25;"),
    ],
)
def test_a_falling_h_is_warned_of_with_where(h: Any, where: str) -> None:
    with pytest.warns(UserWarning, match="h is not increasing: it falls " + where.replace(".", r"\.")) as caught:
        weights("expression", 4, h=h) if isinstance(h, str) else weights(h, 4)
    assert len(caught) == 1


def test_a_constant_h_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="h is constant: nothing is learned from it"):
        weights("expression", 4, h="t - t")


@pytest.mark.parametrize(
    ("objective", "size", "options", "message"),
    [
        ("rloo", 1, {}, "group_size must be >= 2 to compare a sample with the others"),
        ("grpo", 1, {}, "group_size must be >= 2"),
        ("logit", 1, {}, "group_size must be >= 2"),
        ("expression", 1, {"h": "t"}, "group_size must be >= 2"),
        ("oreal_reference", 1, {}, "group_size must be >= 2"),
        ("oreal_paper", 1, {}, "group_size must be >= 2"),
        ("reinforce", 0, {}, "group_size must be an integer >= 1, got 0"),
        ("reinforce", 2.0, {}, "group_size must be an integer >= 1, got 2.0"),
        ("reinfroce", 4, {}, "objective 'reinfroce' is not known; known: reinforce, rloo"),
        ("reinforce", 4, {"n": 2}, "objective reinforce has no option 'n': it has none"),
        ("grpo", 4, {"eps": 2}, "objective grpo has no option 'eps': its options are std, epsilon"),
        (math.sqrt, 4, {"h": "t"}, r"objective h\(t\) has no option 'h': its options are smoothing, baseline"),
        ("grpo", 4, {"std": "sample"}, "std must be one of population, bessel, none, got 'sample'"),
        ("grpo", 4, {"epsilon": -1.0}, "epsilon must be a number >= 0"),
        ("expression", 4, {"h": "t", "smoothing": math.nan}, "smoothing must be a number >= 0"),
        ("oreal_paper", 4, {"negative_coef": -0.5}, "negative_coef must be a number >= 0"),
        ("logit", 4, {"baseline": "rloo"}, "baseline must be one of leave_one_out, none"),
        ("pass_at_n", 4, {"n": 5}, "n must be between 1 and group_size=4 for pass_at_n, got 5"),
        ("pass_at_n", 4, {"n": 0}, "n must be between 1 and group_size=4 for pass_at_n, got 0"),
    ],
)
def test_mistakes_are_one_line(objective: Any, size: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        weights(objective, size, **options)
    assert "\n" not in str(raised.value)


def test_a_group_of_one_has_weights_where_nothing_is_compared() -> None:
    for name in ("reinforce", "rejection_sampling"):
        assert sample_weights(name, torch.tensor([[1.0], [0.0]])).tolist() == [[1.0], [0.0]]
    assert weights("logit", 1, baseline="none")[1].tolist() == [2.0]


@pytest.mark.parametrize("rewards", [torch.tensor([[1.0, -1.0]]), torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0]])])
def test_rewards_are_zero_or_one(rewards: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"rewards must be \[G, M\] and each 0 or 1"):
        sample_weights("reinforce", rewards)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.float64])
def test_rewards_of_any_type(dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=dtype)
    assert sample_weights("grpo", rewards).tolist() == [[1.0, -1.0, -1.0, 1.0], [0.0] * 4, [0.0] * 4]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("oreal_reference", {}),
        ("oreal_reference", {"negative_coef": 2.0}),
        ("oreal_paper", {"preset": "paper"}),
        ("oreal_paper", {"preset": "paper", "negative_coef": 1.0}),
        ("oreal_reference_all", {"selection": "all"}),
    ],
)
def test_oreals_tables_are_what_its_algorithm_trains_on(name: str, settings: dict[str, Any]) -> None:
    """Over the random pair each correct sample is trained on in 1 of c draws: Z = M / c times its weight."""
    config, size = OrealConfig(**settings), 6
    a, b = weights(name, size, negative_coef=config.negative_coef)
    for correct in range(size + 1):
        expected = [float(b[correct - 1]) if correct else 0.0, float(a[correct]) if correct < size else 0.0]
        statuses = ["correct"] * correct + ["incorrect"] * (size - correct)
        samples = [
            Sample("", [1], [2], "", [], [-0.5], "stop", 0, Verdict(float(status == "correct"), status, None))  # type: ignore[arg-type]
            for status in statuses
        ]
        group = Group(Prompt("", (Message("user", ""),), ""), samples)
        chosen = select_sequences([group], config, random.Random(0))
        found = [0.0, 0.0]
        for sequence in chosen:
            count = correct if sequence.is_correct else size - correct
            share = size / count if config.selection == "one_pair" else 1.0
            eta = 1.0 if sequence.is_correct else config.negative_coef
            found[not sequence.is_correct] = sequence.advantage * share * eta
        if name == "oreal_reference_all" and correct in (0, size):
            continue  # leave-one-out weighs nothing there
        assert found == pytest.approx(expected, abs=1e-9), correct
