"""Converts between the weights of samples and the function h of the pass rate that these weights optimise.

The source is Davis & Recht 2025, arXiv:2510.13651. A prompt has M samples. For each sample, s is the number of correct
ones among the other M - 1. A correct sample has the weight b_s, an incorrect one a_s, and the update is
(1/M) sum_i Z_i grad log pi(y_i). Its expectation is the gradient of h(p), where p is the pass rate and

    h'(t) = sum_s (b_s - a_s) C(M-1, s) t^s (1-t)^(M-1-s)

The expectation depends only on d = b - a. For an objective that defines only d, the leave-one-out split
b_s = d_s (1 - s/(M-1)), a_s = -d_s s/(M-1) has the same expectation as b = d, a = 0, and less variance when there are
many possible answers and t > 1/M.
"""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.algorithms.expression import parse_expression

Table = tuple[Tensor, Tensor]  # (a, b): [M] float64 each, index s = number of other correct samples
Function = Callable[[Any], Any]  # h(t), t in [0, 1]
BASELINES = ("leave_one_out", "none")
DEVIATIONS = ("population", "bessel", "none")
NUM_CHECKED = 200  # intervals on which h is checked for a decrease, besides those between k/M


def weights(objective: str | Function, group_size: int, **options: Any) -> Table:
    """Returns (a, b), float64 [M] each, for a name in OBJECTIVES or for a callable h(t).

    The options are `n` (pass_at_n, default 2), `std` and `epsilon` (grpo), `h` (expression), `smoothing` (expression
    and callables), `baseline` (pass_at_n, logit, expression, callables), `negative_coef` (OREAL's variants).
    Raises ValueError for an unknown name or option, and if the objective has no weights for this group size.

    Example: weights("rloo", 2) is ([0, -1], [1, 0]): of one correct and one incorrect sample the correct one has the
    weight 1 and the incorrect one -1.
    """
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be an integer >= 1, got {group_size!r}")
    if callable(objective):
        return expression(group_size, **(checked_options("h(t)", expression, options, without="h") | {"h": objective}))
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is not known; known: {', '.join(OBJECTIVES)}, or a callable h(t)")
    build = OBJECTIVES[objective]
    return build(group_size, **checked_options(objective, build, options))


def h_prime(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """Returns h'(t), float64, in the shape of t. a, b: [M]; t in [0, 1]."""
    return bernstein(b - a, t)


def h_value(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """Returns h(t), the integral of h' from 0: a Bernstein polynomial of degree M. The shapes are those of h_prime."""
    return bernstein(torch.cat([b.new_zeros(1), (b - a).cumsum(0)]) / len(b), t)


def sample_weights(objective: str | Function, rewards: Tensor, **options: Any) -> Tensor:
    """Returns the weight Z of each sample, float64: rewards [G, M], each 0 or 1 -> [G, M]."""
    if rewards.dim() != 2 or not bool(((rewards == 0) | (rewards == 1)).all()):
        raise ValueError(f"rewards must be [G, M] and each 0 or 1, got shape {tuple(rewards.shape)}")
    a, b = (table.to(rewards.device) for table in weights(objective, rewards.shape[1], **options))
    correct = rewards == 1
    others = correct.sum(dim=-1, keepdim=True) - correct.long()  # [G, M]
    return torch.where(correct, b[others], a[others])


def bernstein(coefficients: Tensor, t: Tensor | float) -> Tensor:
    """Returns sum_k c_k C(n, k) t^k (1-t)^(n-k), by de Casteljau's stable recursion. coefficients: [n + 1]."""
    t = torch.as_tensor(t, dtype=torch.float64)
    if bool(((t < 0) | (t > 1)).any()):
        raise ValueError("t must be in [0, 1]")
    values = coefficients.double().expand(*t.shape, -1)
    while values.shape[-1] > 1:
        values = (1 - t)[..., None] * values[..., :-1] + t[..., None] * values[..., 1:]
    return values[..., 0]


def reinforce(group_size: int) -> Table:
    """h = t."""
    return torch.zeros(group_size, dtype=torch.float64), torch.ones(group_size, dtype=torch.float64)


def rloo(group_size: int) -> Table:
    """h = t."""
    return split(torch.ones(group_size, dtype=torch.float64), "leave_one_out")


def rejection_sampling(group_size: int) -> Table:
    """Averages over the correct samples; a group without any has no weight: h' = (1 - (1-t)^M) / t, h -> log t."""
    return split(group_size / (num_others(group_size) + 1), "none")


def grpo(group_size: int, std: str = "population", epsilon: float = 0.0) -> Table:
    """Weights by (reward - mean) / (standard deviation + epsilon): h -> 2 arcsin(sqrt(t)); 0/0 counts as 0.

    `std` is "population", "bessel" (times sqrt(M / (M-1))) or "none" (Dr. GRPO: no division, epsilon is unused).
    """
    check_choice("std", std, DEVIATIONS)
    check_not_negative("epsilon", epsilon)
    check_others(group_size)
    s = num_others(group_size)
    a, b = -s / group_size, 1 - (s + 1) / group_size
    if std == "none":
        return a, b

    def scale(num_correct: Tensor) -> Tensor:
        deviation = (num_correct * (group_size - num_correct)).sqrt() / group_size
        bessel = math.sqrt(group_size / (group_size - 1)) if std == "bessel" else 1.0
        return deviation * bessel + epsilon

    return torch.where(a == 0, 0.0, a / scale(s)), torch.where(b == 0, 0.0, b / scale(s + 1))


def pass_at_n(group_size: int, n: int = 2, baseline: str = "leave_one_out") -> Table:
    """Optimises h = 1 - (1-t)^n, with an unbiased estimate from M >= n samples."""
    if not 1 <= n <= group_size:
        raise ValueError(f"n must be between 1 and group_size={group_size} for pass_at_n, got {n}")
    d = [n * math.comb(group_size - 1 - s, n - 1) / math.comb(group_size - 1, n - 1) for s in range(group_size)]
    return split(torch.tensor(d, dtype=torch.float64), baseline)


def logit(group_size: int, baseline: str = "leave_one_out") -> Table:
    """Averages over correct and over incorrect samples, d = M/(s+1) + M/(M-s): h -> log(t / (1-t))."""
    s = num_others(group_size)
    return split(group_size * (group_size + 1) / ((s + 1) * (group_size - s)), baseline)


def expression(
    group_size: int, h: str | Function = "", smoothing: float = 0.0, baseline: str = "leave_one_out"
) -> Table:
    """Optimises any h: d_s = M (h((s+1)/M) - h(s/M)) has the Bernstein polynomial of h, minus h(0), as its objective.

    With smoothing delta, h((t + delta) / (1 + 2 delta)) takes h's place: log(t / (1-t)) becomes
    log((t + delta) / (1-t + delta)). Warns of intervals on which h decreases. Raises ValueError if h is not finite.
    """
    check_not_negative("smoothing", smoothing)
    function = parse_expression(h) if isinstance(h, str) else h

    def smooth(t: float) -> float:
        return real_value(function, (t + smoothing) / (1 + 2 * smoothing))

    points = sorted({k / group_size for k in range(group_size + 1)} | {k / NUM_CHECKED for k in range(NUM_CHECKED + 1)})
    values = {t: smooth(t) for t in points}
    check_finite(values, smoothing, group_size)
    warn_where_decreasing(points, values)
    at_nodes = torch.tensor([values[k / group_size] for k in range(group_size + 1)], dtype=torch.float64)
    return split(group_size * at_nodes.diff(), baseline)


def oreal_reference(group_size: int, negative_coef: float = 0.5) -> Table:
    """OREAL's published code without token weights: it trains on one sample of each kind of each mixed group.

    Their advantages are leave-one-out of the rewards 1 and -1. All sequences count alike; there are no token
    denominators. h' = 2M/(M-1) ((1-(1-t)^M)/t - 1 + eta ((1-t^M)/(1-t) - 1)).
    """
    a, b = oreal_reference_all(group_size, negative_coef)
    s = num_others(group_size)
    return a * group_size / (group_size - s), b * group_size / (s + 1)


def oreal_reference_all(group_size: int, negative_coef: float = 0.5) -> Table:
    """`oreal_reference` that trains on every sample of every group: h' = 2 (1-t) + 2 eta t."""
    check_not_negative("negative_coef", negative_coef)
    a, b = rloo(group_size)
    return 2 * negative_coef * a, 2 * b


def oreal_paper(group_size: int, negative_coef: float = 0.5) -> Table:
    """OREAL's paper without token weights: it trains on one correct and one incorrect sample of each mixed group.

    Their weights are 1 and 1 - pass rate. h' = (1-(1-t)^M)/t - t^(M-1) + eta (1 - (1-t)^(M-1)).
    """
    check_not_negative("negative_coef", negative_coef)
    check_others(group_size)
    s = num_others(group_size)
    a = torch.where(s > 0, -negative_coef, 0.0).double()
    return a, torch.where(s < group_size - 1, group_size / (s + 1), 0.0)


OBJECTIVES: dict[str, Callable[..., Table]] = {
    "reinforce": reinforce,
    "rloo": rloo,
    "rejection_sampling": rejection_sampling,
    "grpo": grpo,
    "pass_at_n": pass_at_n,
    "logit": logit,
    "expression": expression,
    "oreal_reference": oreal_reference,
    "oreal_reference_all": oreal_reference_all,
    "oreal_paper": oreal_paper,
}


def option_names(build: Callable[..., Table]) -> list[str]:
    return [name for name in inspect.signature(build).parameters if name != "group_size"]


def checked_options(
    objective: str, build: Callable[..., Table], options: dict[str, Any], without: str = ""
) -> dict[str, Any]:
    known = [name for name in option_names(build) if name != without]
    for name in options:
        if name not in known:
            takes = f"its options are {', '.join(known)}" if known else "it has none"
            raise ValueError(f"objective {objective} has no option {name!r}: {takes}")
    return options


def num_others(group_size: int) -> Tensor:
    """Returns s = 0 .. M-1, [M]."""
    return torch.arange(group_size, dtype=torch.float64)


def split(d: Tensor, baseline: str) -> Table:
    """Returns (a, b) with b - a = d."""
    check_choice("baseline", baseline, BASELINES)
    if baseline == "none":
        return torch.zeros_like(d), d
    check_others(len(d))
    share = num_others(len(d)) / (len(d) - 1)
    return 0.0 - d * share, d * (1 - share) + 0.0  # Adding 0.0 turns -0.0 into 0.0.


def check_others(group_size: int) -> None:
    if group_size < 2:
        raise ValueError(
            f"group_size must be >= 2 to compare a sample with the others (leave-one-out, grpo), got {group_size}"
        )


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number >= 0, got {value}")


def real_value(function: Function, t: float) -> float:
    """Returns the function's value at t, or nan if it has no real value; functions of tensors are given a tensor."""
    try:
        try:
            value = function(t)
        except TypeError:
            value = function(torch.tensor(t, dtype=torch.float64))
        return float(value)
    except (ArithmeticError, ValueError, TypeError):  # log(0); a complex value
        return math.nan


def check_finite(values: dict[float, float], smoothing: float, group_size: int) -> None:
    wrong = [t for t, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return
    fix = "write one that is finite on [0, 1]"
    if not smoothing and all(t in (0.0, 1.0) for t in wrong):
        fix = f"set smoothing, for example 1/(2 group_size) = {1 / (2 * group_size):g}"
    raise ValueError(f"h diverges or has no real value at t={wrong[0]:g}: {fix}")


def warn_where_decreasing(points: Sequence[float], values: dict[float, float]) -> None:
    """Warns once, naming every interval on which h decreases: there, correct samples become less likely."""
    spread = max(values.values()) - min(values.values())
    if spread == 0:
        warnings.warn("h is constant: nothing is learned from it", stacklevel=4)
    falling: list[list[float]] = []
    for left, right in itertools.pairwise(points):
        if values[right] < values[left] - 1e-12 * spread:
            if falling and falling[-1][1] == left:
                falling[-1][1] = right
            else:
                falling.append([left, right])
    if falling:
        where = ", ".join(f"from t={left:g} to t={right:g}" for left, right in falling)
        warnings.warn(f"h is not increasing: it falls {where}; there correct samples are made rarer", stacklevel=4)
