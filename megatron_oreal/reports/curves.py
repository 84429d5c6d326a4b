"""Draws the curves of runs, and lays out tables as plain text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_oreal.observability.files import write_atomically

if TYPE_CHECKING:
    from megatron_oreal.observability.metrics import Metrics  # This imports torch, which a table does not need.

Curves = Sequence[tuple[str, Sequence[str]]]  # (a panel's title, the metrics drawn in it)


def plot_curves(metrics: Sequence[Metrics], curves: Curves, path: Path) -> None:
    """Draws a PNG with one panel for each entry of `curves`, over the step.

    A metric that only some steps have is drawn at those steps; a panel without any number says so.
    Raises ValueError if there is no panel.
    """
    if not curves:
        raise ValueError("curves is empty: name at least one panel")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_columns = min(2, len(curves))
    num_rows = math.ceil(len(curves) / num_columns)
    figure = Figure(figsize=(6 * num_columns, 3.5 * num_rows), layout="constrained")
    for index, (title, names) in enumerate(curves, start=1):
        axes = figure.add_subplot(num_rows, num_columns, index)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        for name in names:
            records = [record for record in metrics if name in record]
            if records:
                steps, values = zip(*((record["step"], record[name]) for record in records), strict=True)
                # The curve has markers, because no line shows a value between two missing values.
                axes.plot(steps, values, label=name, marker="o", markersize=2.5, linewidth=1.2)
        if axes.lines:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, image.getvalue())


def format_table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """Formats a table as plain text with aligned columns: numbers to the right, floats with four digits, None as "-".

    Raises ValueError for a row whose length is not the header's.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row must have the header's {len(header)} cells, got {len(row)}: {list(row)!r}")
    columns = [[row[index] for row in rows] for index in range(len(header))]
    texts = []
    for name, cells in zip(header, columns, strict=True):
        column = [name, *map(format_cell, cells)]
        width = max(map(len, column))
        is_numeric = all(cell is None or isinstance(cell, int | float) for cell in cells)
        texts.append([text.rjust(width) if is_numeric else text.ljust(width) for text in column])
    lines = ["  ".join(cells).rstrip() for cells in zip(*texts, strict=True)]
    rule = "  ".join("-" * len(column[0]) for column in texts)
    return "\n".join([lines[0], rule, *lines[1:]])


def format_cell(cell: object) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


@dataclass(slots=True, frozen=True)
class Band:
    """A curve, and the distance to either end of its interval."""

    name: str
    steps: Sequence[float]
    means: Sequence[float]
    half_widths: Sequence[float]


def plot_bands(bands: Sequence[Band], title: str, path: Path) -> None:
    """Draws a PNG with one curve and its band for each of `bands`, over the step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel="step")
    axes.grid(alpha=0.3)
    for band in bands:
        (line,) = axes.plot(band.steps, band.means, label=band.name, linewidth=1.5)
        low = [mean - half for mean, half in zip(band.means, band.half_widths, strict=True)]
        high = [mean + half for mean, half in zip(band.means, band.half_widths, strict=True)]
        axes.fill_between(band.steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.legend(fontsize="small")
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image)
    write_atomically(path, image.getvalue())
