import math
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_oreal.reports.curves import format_table, plot_curves


def test_curves_become_a_png_with_a_panel_each(tmp_path: Path) -> None:
    metrics = [{"step": 0, "a": 1.0}, {"step": 1, "a": math.nan, "b": 2.0}, {"step": 2, "a": 3.0}]
    sizes = []
    for curves in ([("A", ["a", "b"])], [("A", ["a"]), ("B", ["b"])], [("A", ["a"]), ("B", ["b"]), ("none", ["c"])]):
        plot_curves(metrics, curves, tmp_path / "curves.png")
        sizes.append(imread(tmp_path / "curves.png").shape[:2])
    assert sizes == [(350, 600), (350, 1200), (700, 1200)]  # [height, width]
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_curve_is_drawn(tmp_path: Path) -> None:
    for name, metrics in (("empty", []), ("drawn", [{"step": 0, "a": 0.0}, {"step": 1, "a": 1.0}])):
        plot_curves(metrics, [("A", ["a"])], tmp_path / f"{name}.png")
    assert (imread(tmp_path / "empty.png") != imread(tmp_path / "drawn.png")).any()


def test_a_plot_needs_a_panel(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curves is empty"):
        plot_curves([], [], tmp_path / "curves.png")


def test_a_table_aligns_its_columns() -> None:
    rows = [["greedy", 0.51239, 3], ["mean", None, 12]]
    assert format_table(rows, ["name", "value", "n"]).splitlines() == [
        "name     value   n",
        "------  ------  --",
        "greedy  0.5124   3",
        "mean         -  12",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert format_table([], ["a", "bb"]) == "a  bb\n-  --"


def test_a_row_of_another_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="a row must have the header's 2 cells, got 1: \\['x'\\]"):
        format_table([["x"]], ["a", "b"])
