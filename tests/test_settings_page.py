"""docs/settings.md: it is current, whole, and says what the sections say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig
from megatron_oreal.config.effects import choice, positive
from megatron_oreal.config.section import Section
from tools import settings_page


class Example(Section):
    """An example."""

    effects = (
        (("first",), choice("kind", "a")),
        (("limit",), positive("first")),
    )

    first: int = Field(default=1, ge=0)  # The first setting.
    # The second setting has a comment
    # of two lines.
    second: float | None = None
    kind: Literal["a", "b"] = "a"  # The kind.
    limit: Annotated[int, Field(gt=0, le=5)]  # The limit | the end.
    bare: bool = True


def test_the_page_is_current() -> None:
    assert settings_page.PAGE.read_text() == settings_page.page(), f"run `{settings_page.COMMAND}`"


@pytest.mark.parametrize("command", [TrainConfig, SftConfig, EvalRunConfig])
def test_every_setting_has_a_row(command: type[Section]) -> None:
    rows = {line.split("`")[1] for line in settings_page.PAGE.read_text().splitlines() if line.startswith("| `")}
    sections = {section for _, _, section in settings_page.SECTIONS}
    for name, field in command.model_fields.items():
        if settings_page.is_nested(field):
            assert field.discriminator or field.annotation in sections
        else:
            assert name in rows


def test_every_section_within_a_section_has_a_table() -> None:
    shown = {section for _, _, section in settings_page.SECTIONS}
    within = {
        field.annotation
        for section in shown
        for field in section.model_fields.values()
        if settings_page.is_nested(field) and not field.discriminator
    }
    assert within <= shown


def test_a_row_has_type_default_sentence_and_when_it_acts() -> None:
    assert settings_page.setting_row("at", "first", Example) == (
        "`at.first`",
        "integer >= 0",
        "`1`",
        "The first setting. Acts where at.kind is a.",
    )
    assert settings_page.setting_row("", "second", Example) == (
        "`second`",
        "number or null",
        "`null`",
        "The second setting has a comment of two lines.",
    )
    assert settings_page.setting_row("", "limit", Example)[1:3] == ("integer > 0 and <= 5", "*required*")
    assert settings_page.setting_row("", "kind", Example)[1:3] == ("`a`, `b`", "`a`")


def test_a_setting_without_a_sentence_is_named() -> None:
    with pytest.raises(ValueError, match=r"Example\.bare has no comment: write one sentence beside it"):
        settings_page.meaning(Example, "bare")


def test_a_rule_of_two_commands_names_both() -> None:
    row = settings_page.setting_row("rollout", "top_p", dict(train_sections())["rollout"])
    assert row[3].endswith("Has no effect for eval.num_samples=0, which is greedy (sft, eval).")


def test_what_only_training_uses_says_so() -> None:
    row = settings_page.setting_row("rollout", "group_size", dict(train_sections())["rollout"])
    assert row[3] == "The number of samples of each prompt. Acts for `train` only."


def train_sections() -> list[tuple[str, type[Section]]]:
    return [(where, section) for where, _, section in settings_page.SECTIONS]


def test_a_stale_page_is_refused_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_page, "PAGE", tmp_path / "settings.md")
    (tmp_path / "settings.md").write_text("old")
    with pytest.raises(SystemExit, match=r"run `python tools/settings_page\.py`"):
        settings_page.main(["--check"], standalone_mode=False)
    assert (tmp_path / "settings.md").read_text() == "old"
    settings_page.main([], standalone_mode=False)
    settings_page.main(["--check"], standalone_mode=False)
