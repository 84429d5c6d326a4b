"""Writes docs/settings.md, the reference of every setting, from the sections in megatron_oreal/config.

    python tools/settings_page.py            writes the page
    python tools/settings_page.py --check    only says whether the page is current

A setting's sentence is the comment beside it or above it, its type and default are those of the field, and the tables
`effects` say when it acts.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import annotated_types
import click
from pydantic.fields import FieldInfo

from megatron_oreal import config
from megatron_oreal.config.algorithms import PRESETS_WITHOUT_REWARD_MODEL
from megatron_oreal.config.correction import CORRECTION_PRESETS, CorrectionSettings
from megatron_oreal.config.models import CriticConfig, RewardModelConfig
from megatron_oreal.config.runs import DataConfig, EvalConfig
from megatron_oreal.config.section import Section, is_section
from megatron_oreal.observability.files import write_atomically

PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
COMMAND = "python tools/settings_page.py"
COMMANDS: dict[str, type[Section]] = {
    "train": config.TrainConfig,
    "sft": config.SftConfig,
    "eval": config.EvalRunConfig,
}
EVERYWHERE = "`train`, `sft` and `eval`"
TRAINING = "`train` and `sft`"
OUTCOMES = "`train`"
# Where each section stands, the commands that have it, and its class.
SECTIONS: tuple[tuple[str, str, type[Section]], ...] = (
    ("", EVERYWHERE, config.ModelRunConfig),
    ("", TRAINING, config.RunConfig),
    ("model", EVERYWHERE, config.ModelConfig),
    ("parallel", EVERYWHERE, config.ParallelConfig),
    ("data", OUTCOMES, DataConfig),
    ("data", "`sft`", config.SftDataConfig),
    ("data", "`eval`", config.PromptConfig),
    ("rollout", EVERYWHERE, config.RolloutConfig),
    ("rollout.sglang", f"{EVERYWHERE}, with `rollout.engine=sglang`", config.SglangConfig),
    ("verifier", EVERYWHERE, config.VerifierConfig),
    ("verifier.judge", f"{EVERYWHERE}, with `verifier.judge.url`", config.JudgeConfig),
    ("verifier.remote", f"{EVERYWHERE}, with `verifier.url`", config.RemoteRewardConfig),
    ("algorithm", f"{OUTCOMES}, with `algorithm.name=oreal`, the default", config.OrealConfig),
    ("algorithm", f"{OUTCOMES}, with `algorithm.name=outcome`", config.OutcomeConfig),
    ("algorithm", f"{OUTCOMES}, with `algorithm.name=ppo`", config.PpoConfig),
    ("algorithm.reward_model", f"{OUTCOMES}, with `algorithm.name=oreal`", RewardModelConfig),
    ("algorithm.critic", f"{OUTCOMES}, with `algorithm.name=ppo`", CriticConfig),
    ("policy", TRAINING, config.PolicyConfig),
    ("optimizer", "`policy`, `algorithm.reward_model` and `algorithm.critic`", config.OptimizerConfig),
    ("checkpoint", TRAINING, config.CheckpointConfig),
    ("trackers", TRAINING, config.TrackersConfig),
    ("trackers.mlflow", TRAINING, config.MlflowConfig),
    ("trackers.wandb", TRAINING, config.WandbConfig),
    ("prometheus", TRAINING, config.PrometheusConfig),
    ("eval", TRAINING, EvalConfig),
    ("eval", "`eval`", config.BenchmarkConfig),
    ("logging", OUTCOMES, config.LoggingConfig),
    ("alarms", TRAINING, config.MachineAlarms),
    ("alarms", OUTCOMES, config.AlarmsConfig),
    ("watchdog", TRAINING, config.WatchdogConfig),
)
# Sections whose settings stand in a table of their own, before that of the sections that extend them.
SHOWN_BEFORE: tuple[type[Section], ...] = (config.ModelRunConfig, config.MachineAlarms)
INTRODUCTION = f"""\
# Settings

Every setting of `megatron-oreal train`, `sft` and `eval`, as the YAML file or `section.key=value` on the command line
gives it. `{COMMAND}` writes this page from the sections in
[`megatron_oreal/config`](../megatron_oreal/config/README.md); that page says what is refused, and what may change when
a run is resumed.

A setting that is given where it has no effect is an error; its row says when it acts. *required* settings have no
default. `megatron-oreal train CONFIG.yaml --dry-run` prints all settings of a run with their values.
"""


def page() -> str:
    sections = [section_text(where, owners, section) for where, owners, section in SECTIONS]
    return "\n".join([INTRODUCTION, contents(), *sections, presets()])


def contents() -> str:
    rows = [f"- [{title(where, owners)}](#{anchor(title(where, owners))})" for where, owners, _ in SECTIONS]
    return "\n".join([*rows, "- [What presets choose](#what-presets-choose)", ""])


def title(where: str, owners: str) -> str:
    return f"{f'`{where}`' if where else 'The run'} of {owners}"


def anchor(heading: str) -> str:
    """Makes the name that a heading has in a link."""
    return "".join(letter for letter in heading.lower().replace(" ", "-") if letter.isalnum() or letter in "-_")


def section_text(where: str, owners: str, section: type[Section]) -> str:
    rows = [setting_row(where, name, section) for name in own_settings(section)]
    sentence = inspect.getdoc(section) or ""
    return "\n".join(
        [
            f"## {title(where, owners)}",
            "",
            " ".join(sentence.split()),
            "",
            *([*table(HEADER, rows), ""] if rows else []),
        ],
    )


HEADER = ("setting", "type", "default", "meaning")


def own_settings(section: type[Section]) -> list[str]:
    """The section's settings, without the sections within it and without those that another table has."""
    names = [name for name, field in section.model_fields.items() if not is_nested(field)]
    shown_before = next((base.model_fields for base in SHOWN_BEFORE if base in section.__mro__[1:]), ())
    return [name for name in names if name not in shown_before]


def is_nested(field: FieldInfo) -> bool:
    """Whether a field is a section of its own, such as rollout.sglang; a mapping such as eval.prompts is a setting."""
    annotation = field.annotation
    is_union = field.discriminator is not None
    return is_union or (is_section(annotation) and typing.get_origin(annotation) is not dict)


def setting_row(where: str, name: str, section: type[Section]) -> tuple[str, ...]:
    path = f"{where}.{name}" if where else name
    field = section.model_fields[name]
    words = [meaning(section, name), *when_it_acts(where, name, section)]
    return f"`{path}`", type_text(field), default_text(field), " ".join(words)


def when_it_acts(where: str, name: str, section: type[Section]) -> Iterator[str]:
    """The sentences of the tables `effects` about the setting: of its own section, of the commands, of algorithms."""
    at = f"{where}." if where else ""
    for owner in section.__mro__:
        for settings, acts in owner.__dict__.get("effects", ()):
            if any(setting == name for setting in settings) and not in_commands(owner):
                yield acts.sentence(at)
    path = f"{at}{name}"
    owners_of: dict[str, list[str]] = {}
    for command, kind in COMMANDS.items():
        for settings, acts in kind.__dict__.get("effects", ()):
            if path in settings and is_part_of(section, where, kind):
                owners_of.setdefault(acts.sentence(""), []).append(command)
    if {"sft", "eval"} <= {sentence.partition(",")[0].removeprefix("Has no effect for ") for sentence in owners_of}:
        owners_of = {sentence: owners for sentence, owners in owners_of.items() if owners == ["train"]}
        yield "Acts for `train` only."
    yield from (sentence_about(owners, sentence) for sentence, owners in owners_of.items())
    for algorithm, kind in config.ALGORITHM_SECTIONS.items():
        if where != "algorithm" or section is kind:
            for settings, acts in kind.run_effects:
                if path in settings:
                    yield sentence_about([] if where == "algorithm" else [algorithm], acts.sentence(""))


def in_commands(owner: type) -> bool:
    return owner in COMMANDS.values()


def is_part_of(section: type[Section], where: str, command: type[Section]) -> bool:
    """Whether the class is the one that stands at `where` in the command's configuration."""
    field = command.model_fields.get(where.partition(".")[0])
    if field is None:
        return False
    return "." in where or where == "algorithm" or field.annotation is section


def sentence_about(owners: Sequence[str], sentence: str) -> str:
    """Names the commands that have the rule, unless all have it or the sentence says so itself."""
    says_so = any(f"for {owner}," in sentence or f"={owner}" in sentence for owner in owners)
    if not owners or says_so or len(owners) == len(COMMANDS) or owners == ["train"]:
        return sentence
    return f"{sentence.removesuffix('.')} ({', '.join(owners)})."


def meaning(section: type[Section], name: str) -> str:
    """The comment of a field in the class that has it. Raises ValueError where there is none."""
    for owner in section.__mro__:
        if name in inspect.get_annotations(owner):
            text = comments(owner).get(name, "")
            if text:
                return text
    raise ValueError(f"{section.__name__}.{name} has no comment: write one sentence beside it in config/")


def comments(owner: type) -> dict[str, str]:
    """The comment beside each annotated name of a class, or else the lines of comment right above it."""
    source = textwrap.dedent(inspect.getsource(owner))
    found = {
        token.start[0]: (token.string.removeprefix("#").strip(), token.line.strip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    texts = {}
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            lines = [found[line][0] for line in lines_above(statement.lineno, found)]
            beside = found.get(statement.end_lineno or 0)
            if beside is not None and not beside[1]:
                lines.append(beside[0])
            texts[statement.target.id] = " ".join(lines)
    return texts


def lines_above(line: int, found: dict[int, tuple[str, bool]]) -> list[int]:
    """The numbers of the lines of comment that end right above a line."""
    first = line
    while found.get(first - 1, ("", False))[1]:
        first -= 1
    return list(range(first, line))


def type_text(field: FieldInfo) -> str:
    return words_of_type(field.annotation, field.metadata)


def words_of_type(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return words_of_type(arguments[0], [*arguments[1:], *metadata])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(words_of_type(argument, metadata) for argument in arguments)
    if origin is Literal:
        return ", ".join(f"`{argument}`" for argument in arguments)
    if origin is list:
        return f"list of {words_of_type(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {words_of_type(arguments[1])}"
    if origin is tuple:
        return f"({', '.join(map(words_of_type, arguments))})"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", types.NoneType: "null"}
    bounds = bounds_of(metadata) if annotation in (int, float) else []
    return " ".join([names.get(annotation, "any value"), *([" and ".join(bounds)] if bounds else [])])


def bounds_of(metadata: Sequence[Any]) -> list[str]:
    """Words such as ">= 1", of pydantic's and annotated_types' limits."""
    signs: dict[type, tuple[str, str]] = {
        annotated_types.Gt: ("gt", ">"),
        annotated_types.Ge: ("ge", ">="),
        annotated_types.Lt: ("lt", "<"),
        annotated_types.Le: ("le", "<="),
    }
    found = [(limit, *signs[type(limit)]) for limit in metadata if type(limit) in signs]
    return [f"{sign} {getattr(limit, name):g}" for limit, name, sign in found]


def default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, str) and "\n" in value:
        return "a text in [`verifier.py`](../megatron_oreal/config/verifier.py)"
    return f"`{plain(value)}`"


def plain(value: Any) -> str:
    """The value as one writes it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return '""' if value == "" else str(value)


def presets() -> str:
    """The values that algorithm.preset and rollout.correction choose where a setting is not given."""
    without = {f"{name}, without reward model": chosen for name, chosen in PRESETS_WITHOUT_REWARD_MODEL.items()}
    oreal = preset_table("algorithm", config.OrealConfig, config.OREAL_PRESETS | without)
    correction = preset_table("rollout", CorrectionSettings, CORRECTION_PRESETS)
    rows = ["## What presets choose", "", "A preset chooses the settings that are not given themselves."]
    rows += ["An empty place is the setting's default; without a reward model, it is what the preset chooses."]
    return "\n".join([*rows, "", *oreal, "", *correction, ""])


def preset_table(where: str, section: type[Section], chosen: dict[str, dict[str, Any]]) -> list[str]:
    used = [name for name in section.model_fields if any(name in choices for choices in chosen.values())]
    rows = [
        (f"`{where}.{name}`", *(f"`{plain(choices[name])}`" if name in choices else "" for choices in chosen.values()))
        for name in used
    ]
    return table(("setting", *chosen), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; end with an error where the page is not current.")
def main(check: bool) -> None:
    """Writes docs/settings.md, the reference of every setting."""
    text = page()
    is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
    if check and not is_current:
        sys.exit(f"docs/settings.md is not current: run `{COMMAND}`")
    if not is_current:
        PAGE.parent.mkdir(exist_ok=True)
        write_atomically(PAGE, text)
    click.echo(f"docs/settings.md: {'current' if is_current else 'written'}")


if __name__ == "__main__":
    main()
