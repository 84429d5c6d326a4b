"""`megatron-oreal objective`: tables, curves and one-line mistakes."""

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from click.testing import CliRunner

from megatron_oreal.algorithms.expression import parse_expression
from megatron_oreal.algorithms.objectives import OBJECTIVES, h_prime, h_value
from megatron_oreal.cli import cli
from megatron_oreal.reports.objective import LIMITS, plot_objectives, read_objective, read_objectives


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["objective", *arguments])


def test_weights_and_curve_are_printed() -> None:
    result = run("rloo", "--group-size", "3")
    assert result.exit_code == 0
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["rloo,", "3", "samples", "a", "group"]
    assert ["1", "-0.5", "0.5", "1"] in lines  # s, a, b, b - a
    assert ["0.25", "1", "0.25"] in lines  # t, h', h
    assert result.stderr == ""


def test_several_objectives_share_a_figure(tmp_path: Path) -> None:
    out = tmp_path / "objectives.png"
    names = [name for name in OBJECTIVES if name != "expression"]
    result = run(*names, "expression", "--h", "sin(9*t)", "--n", "2", "--group-size", "4", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "pass_at_n (n=2), 4 samples a group" in result.stdout
    assert "expression (h=sin(9*t)), 4 samples a group" in result.stdout
    told, warning = result.stderr.splitlines()
    assert told == f"the plot is {out}; dashed: what large groups approach"
    assert warning.startswith("Warning: h is not increasing: it falls from t=0.175")
    assert matplotlib.image.imread(out).shape[:2] == (450, 1200)


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_approached(name: str) -> None:
    objective = read_objective(name, 1024, {})
    assert objective.limit is not None
    value, slope = (parse_expression(text) for text in objective.limit)
    for t in (0.3, 0.7):
        assert h_prime(objective.a, objective.b, t).item() == pytest.approx(slope(t), rel=0.01)
        found = h_value(objective.a, objective.b, torch.tensor([t, 0.5]))
        assert float(found[0] - found[1]) == pytest.approx(value(t) - value(0.5), rel=0.01)


def test_an_option_goes_to_the_objectives_that_have_it() -> None:
    first, second, third = read_objectives(["pass_at_n", "rloo", "grpo"], 4, {"n": 2, "std": "none"})
    assert (first.title, second.title, third.title) == ("pass_at_n (n=2)", "rloo", "grpo (std=none)")
    assert third.limit == ("t", "1")
    eta = read_objective("oreal_paper", 4, {"negative_coef": 2.0})
    assert eta.limit == ("log(t) + 2*t", "1/t + 2")


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["rloo"], {"n": 3}, "--n has no meaning for rloo: drop it"),
        (["rloo", "grpo"], {"negative_coef": 1.0}, "--negative-coef has no meaning for rloo, grpo: drop it"),
        (["best"], {}, "NAME 'best' is not known"),
        (["expression"], {}, "--h is required for expression"),
    ],
)
def test_mistakes_are_one_line(names: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_objectives(names, 4, options)


def test_the_figure_needs_a_folder_and_a_format(tmp_path: Path) -> None:
    objectives = read_objectives(["grpo"], 4, {})
    with pytest.raises(ValueError, match=r"--out must name a \.png file, got curve\.pdf"):
        plot_objectives(objectives, Path("curve.pdf"))
    with pytest.raises(ValueError, match=r"--out: the folder .* does not exist; make it"):
        plot_objectives(objectives, tmp_path / "none" / "curve.png")


@pytest.mark.parametrize(
    ("name", "size", "options", "message"),
    [
        ("expression", 8, {}, r"^--h is required for expression"),
        ("expression", 8, {"h": " "}, r"^--h is required for expression"),
        ("expression", 8, {"h": "foo(t)"}, r"^--h: 'foo' at character 1 is not in the grammar"),
        ("expression", 8, {"h": "log(t)"}, r"^--h diverges .*: set --smoothing, for example"),
        ("pass_at_n", 8, {"n": 20}, r"^--n must be between 1 and --group-size=8"),
        ("grpo", 1, {}, r"^--group-size must be >= 2"),
        ("grpo", 8, {"epsilon": -1.0}, r"^--epsilon must be a number >= 0"),
        ("grpoo", 8, {}, r"^NAME 'grpoo' is not known; known: .*oreal_paper$"),
    ],
)
def test_errors_name_the_options(name: str, size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_objectives([name], size, options)
