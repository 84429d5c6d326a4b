"""The pages: their commands can be given, the settings and metrics that they name exist, their tables are true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from megatron_oreal.cli import cli
from megatron_oreal.commands import convert, doctor, export, prepare_data, select_data, tag_skills
from megatron_oreal.commands.tools import TOOLS
from megatron_oreal.weights.families import FAMILIES
from tests.support.metric_names import PREFIXES, documented, is_documented
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(
    [
        ROOT / "README.md",
        *DOCS.glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
        *(ROOT / "megatron_oreal").rglob("*.md"),
    ]
)
OWN = [page for page in sorted(DOCS.glob("*.md")) if page.name not in ("settings.md", "metrics.md")]
COMMAND = re.compile(r"^ {4,}(?:.* )?(?:\S*/)?megatron-oreal ((?:.*\\\n)*.*)$", re.MULTILINE)
INLINE = re.compile(r"`megatron-oreal ([^`\n]+)`")
SECTIONS = "rollout|model|parallel|data|verifier|algorithm|policy|checkpoint|eval|logging|optimizer|alarms|watchdog"
MODULES = {
    "convert": convert.cli,
    "doctor": doctor.main,
    "export": export.main,
    "prepare-data": prepare_data.main,
    "select-data": select_data.main,
    "tag-skills": tag_skills.main,
}


def commands(page: Path) -> list[list[str]]:
    """The words of each command of a page that stands in a block of its own, or within a sentence."""
    text = page.read_text()
    lines = [found.replace("\\\n", " ") for found in COMMAND.findall(text)]
    lines += [found for found in INLINE.findall(text) if " " in found]
    return [shlex.split(line.partition(" # ")[0].partition(" &")[0]) for line in lines]


def check_command(words: list[str]) -> str:
    """Returns what is wrong with a command: a subcommand or an option that does not exist."""
    name, *arguments = words
    if name == "COMMAND":  # any of them
        return ""
    if name not in cli.commands:
        return f"no command {name}"
    command: click.Command = MODULES.get(name, cli.commands[name])
    if isinstance(command, click.Group) and arguments:
        if arguments[0] not in command.commands:
            return f"{name} has no command {arguments[0]}"
        command = command.commands[arguments[0]]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
    unknown = sorted(given - known - {"--help"})
    return f"{name} has no {', '.join(unknown)}" if unknown else ""


def rows(page: str, first: str) -> list[list[str]]:
    """The cells of the table whose heading begins with `first`."""
    _, _, rest = (DOCS / page).read_text().partition(f"| {first} |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def settings() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE))


def test_every_tool_is_checked() -> None:
    assert set(MODULES) == {tool.name for tool in TOOLS}


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_commands_of_the_pages_exist(page: Path) -> None:
    wrong = [found for words in commands(page) if (found := check_command(words))]
    assert not wrong


def test_a_wrong_command_is_found() -> None:
    assert check_command(["tarin", "c.yaml"]) == "no command tarin"
    assert check_command(["export", "run", "--best"]) == "export has no --best"
    assert check_command(["convert", "hf2mcroe"]) == "convert has no command hf2mcroe"
    assert not check_command(["view", "run", "--out", "x.html", "--disagree"])


@pytest.mark.parametrize("page", [*OWN, DOCS / "metrics.md"], ids=lambda page: page.name)
def test_settings_that_a_page_names_exist(page: Path) -> None:
    assert not unknown_settings(page.read_text())


def unknown_settings(text: str) -> list[str]:
    named = re.findall(rf"[`\s](({SECTIONS})(?:\.[a-z_0-9]+)+)(?=[`=\s])", text)
    known = settings()
    # The table of optimizers stands once for the three models that have one.
    known |= {
        f"{owner}.{name}"
        for name in known
        if name.startswith("optimizer.")
        for owner in ("policy", "algorithm.reward_model", "algorithm.critic")
    }
    nested = {name.rpartition(".")[0] for name in known}
    return [name for name, _ in named if name not in known | nested]


def test_a_wrong_setting_is_found() -> None:
    text = "`rollout.group_size=8`, `policy.optimizer.lr`, `verifier.judge` and `rollout.group`, x model.pth=1 "
    assert unknown_settings(text) == ["rollout.group", "model.pth"]


@pytest.mark.parametrize("page", OWN, ids=lambda page: page.name)
def test_metrics_that_a_page_names_exist(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(PREFIXES)})/[\w<>@/]+)`", page.read_text())
    names = [re.sub(r"<\w+>", "x", name) for name in named]
    assert not [name for name in names if not is_documented(name) and name not in documented()]


def test_the_families_are_those_of_the_program() -> None:
    table = {cells[0].strip("`"): cells for cells in rows("families.md", "`model_type`")}
    assert set(table) == set(FAMILIES)
    assert {name: cells[2] == "yes" for name, cells in table.items()} == {
        name: family.decoder is not None for name, family in FAMILIES.items()
    }
    headings = re.findall(r"^## (\w+)$", (DOCS / "families.md").read_text(), re.MULTILINE)
    assert set(FAMILIES) <= set(headings)


def test_the_layouts_divide_the_models() -> None:
    table = rows("families.md", "model")
    assert len(table) >= 15
    for model, layers, heads, kv_heads, tensor, pipelines in table:
        assert int(heads) % int(tensor) == 0 and int(kv_heads) % int(tensor) == 0, model
        assert int(tensor) == min(8, int(kv_heads)), model
        assert all(int(layers) % int(pipeline) == 0 for pipeline in pipelines.split(",")), model
