"""Describes the charts of the report, and writes them as JSON for the page's script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

MAX_POINTS = 2000  # largest number of points of a curve; each point of a longer run is a mean over several steps

Curve = dict[float, float]  # step -> value


@dataclass(slots=True)
class Series:
    """One curve of a chart, or one layer of a stack, or one histogram."""

    label: str
    values: Curve
    low: Curve = field(default_factory=dict)  # the band over seeds; empty if there is none
    high: Curve = field(default_factory=dict)
    colour: int = 0  # index into the page's palette
    dashes: int = 0  # index into the page's kinds of dashes


@dataclass(slots=True, frozen=True)
class Mark:
    """A dashed line at a step."""

    step: float
    label: str


@dataclass(slots=True)
class Chart:
    title: str
    series: list[Series]
    kind: Literal["lines", "stacked", "bars"] = "lines"
    note: str = ""
    x_label: str = "step"
    metrics: tuple[str, ...] = ()  # the names of the drawn metrics
    marks: list[Mark] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """Returns the chart with all its curves over one common axis; null where a curve has no value."""
        x = sorted({step for series in self.series for step in series.values})
        return {
            "title": self.title,
            "kind": self.kind,
            "xLabel": self.x_label,
            "x": [rounded(step) for step in x],
            "series": [
                {
                    "label": one.label,
                    "colour": one.colour,
                    "dashes": one.dashes,
                    "values": [rounded(one.values.get(step)) for step in x],
                    **({"low": column(one.low, x), "high": column(one.high, x)} if one.low else {}),
                }
                for one in self.series
            ],
            **(
                {"marks": [{"x": rounded(mark.step), "label": mark.label} for mark in self.marks]} if self.marks else {}
            ),
        }


def column(curve: Curve, steps: Sequence[float]) -> list[float | None]:
    return [rounded(curve.get(step)) for step in steps]


def rounded(value: float | None) -> float | None:
    """Rounds to five digits, more than a chart shows; returns None for NaN and infinity, which JSON lacks."""
    if value is None or not math.isfinite(value):
        return None
    if float(value).is_integer() and abs(value) < 1e15:
        return int(value)
    return float(f"{value:.5g}")


def bucket_width(last_steps: Iterable[float]) -> int:
    """Returns over how many steps a point is the mean, so that no curve has more than MAX_POINTS."""
    return max(1, math.ceil((max(last_steps, default=0) + 1) / MAX_POINTS))


def thinned(curve: Curve, width: int) -> Curve:
    """Returns the means over `width` steps, each at the first of its steps."""
    if width == 1:
        return curve
    buckets: dict[float, list[float]] = {}
    for step, value in curve.items():
        buckets.setdefault(step // width * width, []).append(value)
    return {step: sum(values) / len(values) for step, values in buckets.items()}


def over_seeds(label: str, curves: Sequence[Curve]) -> Series | None:
    """Returns the mean of the curves, with a band from least to largest if several have a value."""
    values: dict[float, list[float]] = {}
    for curve in curves:
        for step, value in curve.items():
            if math.isfinite(value):
                values.setdefault(step, []).append(value)
    if not values:
        return None
    series = Series(label, {step: sum(found) / len(found) for step, found in sorted(values.items())})
    if len(curves) > 1:
        series.low = {step: min(found) for step, found in values.items()}
        series.high = {step: max(found) for step, found in values.items()}
    return series


def histogram(label: str, values: Sequence[float], low: float, high: float, num_bins: int = 30) -> Series:
    """Returns the share of the values in each of `num_bins` equal parts of [low, high], at the parts' middles."""
    width = (high - low) / num_bins or 1.0
    counts = [0] * num_bins
    for value in values:
        counts[min(num_bins - 1, max(0, int((value - low) / width)))] += 1
    total = max(1, len(values))
    return Series(label, {low + (index + 0.5) * width: count / total for index, count in enumerate(counts)})
