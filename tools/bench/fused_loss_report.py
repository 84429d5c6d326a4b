"""Holds the measurements of bench_fused_loss.py, one row per method and shape, and formats them."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import click

GEMM, EAGER = "torch.mm", "torch eager"


@dataclass(frozen=True, slots=True)
class Shape:
    tokens: int
    vocabulary: int  # of all tensor-parallel ranks
    hidden: int
    tensor: int  # ranks that the vocabulary is divided by

    @property
    def columns(self) -> int:
        return self.vocabulary // self.tensor

    @property
    def flops(self) -> int:
        """Returns the operations of one matrix product."""
        return 2 * self.tokens * self.hidden * self.columns

    def __str__(self) -> str:
        return f"T {self.tokens}, V {self.vocabulary} / TP {self.tensor}, H {self.hidden}"


@dataclass(slots=True)
class Row:
    """The measurement of one method at one shape: seconds of every round, and bytes, -1 if not measured."""

    shape: Shape
    method: str
    forward_seconds: list[float] = field(default_factory=list)
    training_seconds: list[float] = field(default_factory=list)  # forward and backward
    forward_bytes: int = -1
    training_bytes: int = -1
    max_difference: float = math.nan  # of a log-prob of the first tokens to float32, in nats
    gradient_error: float = math.nan  # of d hidden of those, relative
    weight_error: float = math.nan  # of d weight of the first columns, relative
    failure: str = ""


def median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def columns_of(seconds: list[float], eager: list[float], products: float, num_bytes: int) -> str:
    """Returns median and least milliseconds, ratio to eager, share of the GEMM's rate, MiB."""
    if not seconds:
        return " " * 45
    middle = median(seconds)
    memory = f"{num_bytes / 2**20:.0f}" if num_bytes >= 0 else "-"
    share = f"{products / middle:.0%}"
    return f"{middle * 1e3:11.1f}{min(seconds) * 1e3:9.1f}{middle / median(eager):8.2f}{share:>7s}{memory:>10s}"


def print_shape(shape: Shape, rows: list[Row]) -> None:
    by_name = {row.method: row for row in rows}
    gemm, eager = (by_name.get(name, Row(shape, name)) for name in (GEMM, EAGER))
    product = median(gemm.forward_seconds)
    click.echo(f"\n{shape}: {GEMM} {shape.flops / product / 1e12:.3g} TFLOP/s, {len(gemm.forward_seconds)} rounds")
    heading = f"{'median':>11s}{'least':>9s}{'eager':>8s}{'GEMM':>7s}{'MiB':>10s}"
    click.echo(f"{'milliseconds':20s}{'forward ':-^45s} {'forward and backward ':-^45s}")
    click.echo(f"{'':20s}{heading} {heading}{'max |dlogp|':>13s}{'dH error':>10s}{'dW error':>10s}")
    for row in rows:
        if row.failure:
            click.echo(f"{row.method:20s}{row.failure}")
            continue
        forward = columns_of(row.forward_seconds, eager.forward_seconds, product, row.forward_bytes)
        training = columns_of(row.training_seconds, eager.training_seconds, 3 * product, row.training_bytes)
        errors = f"{row.max_difference:13.2g}{row.gradient_error:10.2g}{row.weight_error:10.2g}"
        click.echo(f"{row.method:20s}{forward} {training}{errors if row.training_seconds else ''}".rstrip())


def draw(rows: list[Row], path: Path) -> None:
    """Plots forward and backward time, and memory, over the tokens, for the largest head that was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    largest = max(rows, key=lambda row: row.shape.columns * row.shape.hidden).shape
    head = (largest.columns, largest.hidden)
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for name in dict.fromkeys(row.method for row in rows):
        points = [
            (row.shape.tokens, median(row.training_seconds) * 1e3, row.training_bytes / 2**20)
            for row in rows
            if row.method == name and (row.shape.columns, row.shape.hidden) == head and row.training_seconds
        ]
        if points:
            tokens, milliseconds, memory = zip(*sorted(points), strict=True)
            style = "-o" if name.startswith("ours") else "--s"
            panels[0].plot(tokens, milliseconds, style, label=name)
            panels[1].plot(tokens, memory, style, label=name)
    for panel, label in zip(panels, ("forward and backward, ms", "beyond inputs and gradients, MiB"), strict=True):
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        panel.set_xticks(ticks := sorted({row.shape.tokens for row in rows}), [f"{tick}" for tick in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"V {largest.vocabulary} / TP {largest.tensor}, H {largest.hidden}")
    figure.savefig(path, dpi=110)
