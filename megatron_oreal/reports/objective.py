"""Shows what an algorithm optimises, as a table and as curves: `megatron-oreal objective NAME --group-size M`."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.algorithms.expression import parse_expression
from megatron_oreal.algorithms.objectives import OBJECTIVES, h_prime, h_value, option_names, weights
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.reports.curves import format_table

PASS_RATES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
# The limit of (h, h') for large groups, for objectives whose small groups have other functions.
LIMITS = {
    "rejection_sampling": ("log(t)", "1/t"),
    "grpo": ("2*asin(sqrt(t))", "1/sqrt(t*(1-t))"),
    "logit": ("log(t/(1-t))", "1/(t*(1-t))"),
    "oreal_reference": ("2*(log(t)-t) - 2*eta*(log(1-t)+t)", "2*(1/t-1) + 2*eta*(1/(1-t)-1)"),
    "oreal_paper": ("log(t) + eta*t", "1/t + eta"),
}
SETTINGS = "h|smoothing|n|std|epsilon|baseline|negative_coef|group_size"


@dataclass(frozen=True, slots=True)
class Objective:
    """A named objective's weights for one group size."""

    name: str
    title: str
    a: Tensor  # [M]
    b: Tensor  # [M]
    limit: tuple[str, str] | None  # of h and h', as expressions
    warnings: tuple[str, ...]


def read_objectives(names: Sequence[str], group_size: int, options: Mapping[str, Any]) -> list[Objective]:
    """Passes each option to the objectives that have it. Raises ValueError if none has it, and as `weights` does."""
    unused = set(options)
    objectives = []
    for name in dict.fromkeys(names):
        known = option_names(OBJECTIVES[name]) if name in OBJECTIVES else []
        own = {option: value for option, value in options.items() if option in known}
        unused -= set(own)
        if name == "expression" and not str(own.get("h", "")).strip():
            raise ValueError("--h is required for expression: give h(t), t the pass rate, e.g. 'log(t / (1 - t))'")
        try:
            objectives.append(read_objective(name, group_size, own))
        except ValueError as error:
            raise ValueError(in_options(str(error))) from None
    if unused:
        raise ValueError(f"--{min(unused).replace('_', '-')} has no meaning for {', '.join(names)}: drop it")
    return objectives


def in_options(message: str) -> str:
    """Returns a message about settings in the words of the command line: "h is ..." becomes "--h is ..."."""
    message = re.sub(rf"^({SETTINGS})\b", lambda found: f"--{found[0].replace('_', '-')}", message)
    message = re.sub(r"^objective (?='.*' is not known)", "NAME ", message).removesuffix(", or a callable h(t)")
    return message.replace("set smoothing", "set --smoothing").replace("group_size=", "--group-size=")


def read_objective(name: str, group_size: int, options: Mapping[str, Any]) -> Objective:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        a, b = weights(name, group_size, **options)
    details = ", ".join(f"{option}={value}" for option, value in options.items())
    limit = LIMITS.get(name)
    if name == "grpo" and options.get("std") == "none":
        limit = ("t", "1")
    if limit is not None:
        eta = f"{options.get('negative_coef', 0.5):g}"
        limit = (limit[0].replace("eta", eta), limit[1].replace("eta", eta))
    title = f"{name} ({details})" if details else name
    return Objective(name, title, a, b, limit, tuple(str(warning.message) for warning in caught))


def describe_objective(objective: Objective) -> str:
    """Lists the weights for each number s of other correct samples, and h' and h at some pass rates."""
    size = len(objective.a)
    table = torch.stack([objective.a, objective.b, objective.b - objective.a], dim=1).tolist()
    t = torch.tensor(PASS_RATES, dtype=torch.float64)
    slopes, values = (function(objective.a, objective.b, t).tolist() for function in (h_prime, h_value))
    lines = [
        f"{objective.title}, {size} samples a group",
        "",
        "a and b: weights of an incorrect and of a correct sample with s other correct ones",
        "",
        format_table([(s, *row) for s, row in enumerate(table)], ["s", "a", "b", "b - a"]),
        "",
        "h: what is optimised, as a function of the pass rate t; h(0) = 0",
        "",
        format_table(list(zip(PASS_RATES, slopes, values, strict=True)), ["t", "h'", "h"]),
    ]
    if objective.limit is not None:
        lines += ["", f"large groups: h' -> {objective.limit[1]}, h -> {objective.limit[0]} + constant"]
    return "\n".join(lines)


def plot_objectives(objectives: Sequence[Objective], path: Path) -> None:
    """Draws a PNG: h minus h(1/2), and h' over the pass rate; dashed lines show the limits of large groups."""
    check_figure_path(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    panels = figure.subplots(1, 2)
    labels = (("h(t) - h(1/2)", h_value), ("h'(t)", h_prime))
    for panel, (axes, (label, function)) in enumerate(zip(panels, labels, strict=True)):
        lowest, highest = 0.0, 0.0
        for number, objective in enumerate(objectives):
            offset = float(h_value(objective.a, objective.b, 0.5)) if panel == 0 else 0.0
            values = function(objective.a, objective.b, t) - offset
            lowest, highest = min(lowest, float(values.min())), max(highest, float(values.max()))
            axes.plot(t, values, color=f"C{number}", label=objective.title, linewidth=1.4)
            if objective.limit is not None:
                curve = limit_curve(objective.limit[panel], t.tolist(), centred=panel == 0)
                axes.plot(t, curve, color=f"C{number}", linestyle="--", linewidth=0.9, alpha=0.7)
        margin = 0.05 * (highest - lowest) or 1.0
        axes.set_ylim(lowest - margin, highest + margin)  # a limit may diverge
        axes.set(xlabel="pass rate t", title=f"{label}, {len(objectives[0].a)} samples a group")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, image.getvalue())


def check_figure_path(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"--out: the folder {path.parent} does not exist; make it")


def limit_curve(text: str, points: Sequence[float], centred: bool) -> list[float]:
    """Computes the limit's curve; it is nan, which matplotlib does not draw, at points where the limit diverges."""
    if text == "1":
        return [1.0 for _ in points]
    function = parse_expression(text)
    offset = function(0.5) if centred else 0.0
    values = [function(point) - offset for point in points]
    return [value if math.isfinite(value) else math.nan for value in values]
