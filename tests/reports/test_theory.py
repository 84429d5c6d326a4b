"""`megatron-oreal objective` of the laws that are no objectives: tables, figures and one-line mistakes."""

from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import torch
from click.testing import CliRunner

from megatron_oreal.cli import cli
from megatron_oreal.reports.theory import LAWS, arcsine_distance, normalised_grpo, read_law


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["objective", *arguments])


def test_best_of_n_is_printed() -> None:
    result = run("best_of_n", "--group-size", "2")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["0.5", "0.75", "1.5", "0.5", "1", "0.5"] in lines
    assert "KL = log n - (n-1)/n = 0.1931 (eq. 4)" in result.stdout


def test_the_optimum_is_printed() -> None:
    result = run("optimum", "--group-size", "8")
    assert result.exit_code == 0, result.output
    # pi* at alpha 1: Z = 0.2 e + 0.8.
    assert "alpha = 1       0.1012     0.3035       0.1488" in result.stdout
    assert "best of 8" in result.stdout
    assert "best of 1" not in run("optimum", "--group-size", "1").stdout


def test_grpo_approaches_the_arcsine() -> None:
    found = [arcsine_distance(size, 0.0) for size in (2, 8, 64, 512)]
    assert found == pytest.approx([0.105, 0.087, 0.042, 0.017], abs=5e-4)
    shrinking = [arcsine_distance(512, epsilon) for epsilon in (10.0, 1.0, 0.1, 0.01, 0.0)]
    assert shrinking == sorted(shrinking, reverse=True)
    ends = normalised_grpo(8, 0.1, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0.0, 0.5, 1.0], abs=1e-9)


@pytest.mark.parametrize("name", LAWS)
def test_each_law_has_a_figure(name: str, tmp_path: Path) -> None:
    out = tmp_path / "law.png"
    result = run(name, "--group-size", "4", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert matplotlib.image.imread(out).shape[:2] == (450, 1200)


@pytest.mark.parametrize(
    ("names", "group_size", "options", "message"),
    [
        (["best_of_n", "grpo"], 4, {}, "best_of_n is no objective: give it alone"),
        (["grpo", "optimum"], 4, {}, "optimum is no objective: give it alone"),
        (["arcsine"], 4, {"epsilon": 0.1}, "--epsilon has no meaning for arcsine: drop it"),
        (["best_of_n"], 4, {"negative_coef": 0.1}, "--negative-coef has no meaning for best_of_n: drop it"),
        (["arcsine"], 1, {}, "--group-size must be from 2 to 1024 for arcsine, got 1"),
        (["best_of_n"], 0, {}, "--group-size must be from 1 to 1024 for best_of_n, got 0"),
    ],
)
def test_mistakes_are_one_line(names: list[str], group_size: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        read_law(names, group_size, options)
    assert str(raised.value) == message


def test_the_figure_needs_a_folder() -> None:
    result = run("best_of_n", "--group-size", "4", "--out", "/none/law.png")
    assert "--out: the folder /none does not exist" in str(result.exception)
