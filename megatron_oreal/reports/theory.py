"""Shows the algorithms' theory as a table and a figure: `megatron-oreal objective best_of_n --group-size N`."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.algorithms.best_of_n import BestOfN, KlOptimum, kl_divergence, ranked_kl
from megatron_oreal.algorithms.objectives import h_value, weights
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.reports.curves import format_table
from megatron_oreal.reports.objective import check_figure_path

PASS_RATES = (0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.95)
# A small example for eq. 2: the answers of an initial policy, two of which are correct.
INITIAL, REWARDS = (0.05, 0.15, 0.2, 0.25, 0.35), (1.0, 1.0, 0.0, 0.0, 0.0)
ALPHAS = (2.0, 1.0, 0.5, 0.2, 0.1)
GROUP_SIZES, EPSILONS = (2, 8, 64, 512), (1.0, 0.3, 0.1, 0.01, 0.0)
MAX_GROUP_SIZE = 1024  # the time and memory of GRPO's curves grow with the group size


def describe_best_of_n(group_size: int) -> str:
    """Evaluates eq. 4 to 6 of OREAL at some pass rates."""
    laws = [BestOfN(group_size, rate) for rate in PASS_RATES]
    rows = [
        (law.pass_rate, law.success, law.correct_factor, law.incorrect_factor, law.positive_weight, law.negative_weight)
        for law in laws
    ]
    return "\n".join(
        [
            f"best_of_n, n = {group_size}: the law of the best of n samples, for binary rewards",
            "",
            "correct, incorrect: how much likelier such a sample is than under the policy (eq. 5);",
            "the factor of correct samples is h' of rejection_sampling with n samples a group",
            "positive, negative: n (1-p)^(n-1) and n (1-p)^n, the weights of the gradient of 1 - (1-p)^n (eq. 6)",
            "",
            format_table(rows, ["p", "1 - (1-p)^n", "correct", "incorrect", "positive", "negative"]),
            "",
            "KL: from the policy, in nats; alpha: the weight of the KL for which eq. 2's optimum is best-of-n",
            "",
            format_table([(law.pass_rate, law.kl, law.alpha) for law in laws], ["p", "KL", "alpha"]),
            "",
            f"rewards without ties: KL = log n - (n-1)/n = {ranked_kl(group_size):.4g} (eq. 4)",
        ]
    )


def describe_optimum(group_size: int) -> str:
    """Evaluates eq. 2 of OREAL on the small example, beside best-of-n with the same pass rate."""
    pass_rate = math.fsum(p for p, reward in zip(INITIAL, REWARDS, strict=True) if reward)
    law = BestOfN(group_size, pass_rate)
    alphas = [("", alpha) for alpha in ALPHAS] + [(f"best of {group_size}", law.alpha)] * (group_size > 1)
    rows: list[tuple[object, ...]] = [("pi_0", *INITIAL, pass_rate, 0.0, "-")]
    for name, alpha in alphas:
        optimum = KlOptimum(INITIAL, REWARDS, alpha)
        rows.append(
            (
                name or f"alpha = {alpha:g}",
                *optimum.policy,
                math.fsum(p * q for p, q in zip(optimum.policy, REWARDS, strict=True)),
                kl_divergence(optimum.policy, INITIAL),
                alpha * optimum.log_z,
            )
        )
    answers = [f"{'correct' if reward else 'incorrect'} {place + 1}" for place, reward in enumerate(REWARDS)]
    return "\n".join(
        [
            "optimum: pi* = pi_0 exp(Q / alpha) / Z maximises E[Q] - alpha KL(pi || pi_0) (eq. 2 of OREAL)",
            "",
            "Q is 1 for a correct answer, else 0: the log-odds of the pass rate p rise by 1 / alpha, and all correct",
            f"answers by the same factor. The best of n samples has this form too, with alpha = {law.alpha:.4g} for "
            f"n = {group_size}.",
            "",
            format_table(rows, ["", *answers, "p", "KL", "alpha log Z"]),
        ]
    )


def describe_arcsine(group_size: int) -> str:
    """Lists the distance of GRPO's h, scaled to [0, 1], from the arcsine for larger groups and smaller epsilon."""
    sizes = sorted({size for size in GROUP_SIZES if size < group_size} | {group_size})
    growing = [(size, arcsine_distance(size, 0.0)) for size in sizes]
    shrinking = [(epsilon, arcsine_distance(group_size, epsilon)) for epsilon in EPSILONS]
    return "\n".join(
        [
            "arcsine: GRPO's h, scaled to h(0) = 0 and h(1) = 1, against 2 arcsin(sqrt(t)) / pi",
            "",
            "distance: the largest difference over t in [0, 1]",
            "",
            format_table(growing, ["samples (epsilon = 0)", "distance"]),
            "",
            format_table(shrinking, [f"epsilon ({group_size} samples)", "distance"]),
        ]
    )


def normalised_grpo(group_size: int, epsilon: float, t: Tensor) -> Tensor:
    """Returns h(t) / h(1) of GRPO, which is in [0, 1] for every group size."""
    a, b = weights("grpo", group_size, epsilon=epsilon)
    return h_value(a, b, t) / h_value(a, b, 1.0)


def arcsine(t: Tensor) -> Tensor:
    return 2.0 / math.pi * t.sqrt().asin()


def arcsine_distance(group_size: int, epsilon: float) -> float:
    t = pass_rates()
    return float((normalised_grpo(group_size, epsilon, t) - arcsine(t)).abs().max())


def pass_rates() -> Tensor:
    """Returns 401 points in [0, 1], denser at its ends, where arcsin(sqrt(t)) is steepest."""
    return (torch.linspace(0, math.pi / 2, 401, dtype=torch.float64).sin() ** 2).clamp(0.0, 1.0)


Curve = tuple[Sequence[float], Sequence[float], str]  # x, y, label


def best_of_n_panels(group_size: int) -> list[tuple[str, str, list[Curve]]]:
    rates = [k / 400 for k in range(1, 400)]
    laws = [BestOfN(group_size, rate) for rate in rates]
    weighing: list[Curve] = [
        (rates, [law.correct_factor for law in laws], "factor of a correct sample = h' of rejection sampling"),
        (rates, [law.incorrect_factor for law in laws], "factor of an incorrect sample"),
        (rates, [law.positive_weight for law in laws], "positive weight n (1-p)^(n-1)"),
        (rates, [law.negative_weight for law in laws], "negative weight n (1-p)^n"),
    ]
    sizes = [float(2**k) for k in range(9)]
    divergence: list[Curve] = [(sizes, [ranked_kl(int(size)) for size in sizes], "no ties: log n - (n-1)/n")]
    for rate in (0.1, 0.3, 0.7):
        divergence.append((sizes, [BestOfN(int(size), rate).kl for size in sizes], f"binary rewards, p = {rate}"))
    return [(f"best of {group_size}", "pass rate p", weighing), ("KL(best-of-n || policy)", "n", divergence)]


def optimum_panels(group_size: int) -> list[tuple[str, str, list[Curve]]]:
    rates = [k / 400 for k in range(1, 400)]
    tilted: list[Curve] = []
    for alpha in ALPHAS:
        optima = [KlOptimum((rate, 1.0 - rate), (1.0, 0.0), alpha) for rate in rates]
        tilted.append((rates, [optimum.policy[0] for optimum in optima], f"alpha = {alpha:g}"))
    tilted.append((rates, [BestOfN(group_size, rate).success for rate in rates], f"best of {group_size}"))
    pairs: list[Curve] = []
    for rate in (0.1, 0.3, 0.7):
        optima = [KlOptimum((rate, 1.0 - rate), (1.0, 0.0), 1.0 / (0.1 * k)) for k in range(1, 101)]
        divergences = [0.0, *(kl_divergence(optimum.policy, optimum.initial) for optimum in optima)]
        reached = [rate, *(optimum.policy[0] for optimum in optima)]
        pairs.append((divergences, reached, f"pass rate of pi_0 = {rate}"))
    return [
        ("pass rate of pi*, by that of pi_0", "pass rate of pi_0", tilted),
        ("pass rate of pi*, by its distance from pi_0", "KL(pi* || pi_0)", pairs),
    ]


def arcsine_panels(group_size: int) -> list[tuple[str, str, list[Curve]]]:
    t = pass_rates()
    limit: Curve = (t.tolist(), arcsine(t).tolist(), "2 arcsin(sqrt(t)) / pi")
    sizes = sorted({size for size in GROUP_SIZES if size < group_size} | {group_size})
    growing = [(t.tolist(), normalised_grpo(size, 0.0, t).tolist(), f"{size} samples") for size in sizes]
    shrinking = [
        (t.tolist(), normalised_grpo(group_size, epsilon, t).tolist(), f"epsilon = {epsilon:g}") for epsilon in EPSILONS
    ]
    return [
        ("GRPO's h, epsilon = 0", "pass rate t", [*growing, limit]),
        (f"GRPO's h, {group_size} samples", "pass rate t", [*shrinking, limit]),
    ]


@dataclass(frozen=True, slots=True)
class Law:
    """The table and the figure of `megatron-oreal objective NAME` for a name that is not an objective."""

    describe: Callable[[int], str]
    panels: Callable[[int], list[tuple[str, str, list[Curve]]]]  # (title, label of x, curves)
    min_group_size: int = 1


LAWS: dict[str, Law] = {
    "best_of_n": Law(describe_best_of_n, best_of_n_panels),
    "optimum": Law(describe_optimum, optimum_panels),
    "arcsine": Law(describe_arcsine, arcsine_panels, min_group_size=2),
}


def read_law(names: Sequence[str], group_size: int, options: Mapping[str, Any]) -> Law | None:
    """Returns the requested law, or None if the names are objectives.

    Raises ValueError for a law among other names, with options, or with a group size that it does not support.
    """
    name = next((name for name in names if name in LAWS), None)
    if name is None:
        return None
    if set(names) != {name}:
        raise ValueError(f"{name} is no objective: give it alone")
    if options:
        raise ValueError(f"--{min(options).replace('_', '-')} has no meaning for {name}: drop it")
    if not LAWS[name].min_group_size <= group_size <= MAX_GROUP_SIZE:
        raise ValueError(
            f"--group-size must be from {LAWS[name].min_group_size} to {MAX_GROUP_SIZE} for {name}, got {group_size}"
        )
    return LAWS[name]


def plot_law(law: Law, group_size: int, path: Path) -> None:
    """Draws a PNG of the law's panels."""
    check_figure_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = law.panels(group_size)
    for axes, (title, label, curves) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for x, y, name in curves:
            axes.plot(x, y, label=name, linewidth=1.4, linestyle="--" if "arcsin" in name else "-")
        if label == "n":
            axes.set_xscale("log", base=2)
        axes.set(xlabel=label, title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, image.getvalue())
