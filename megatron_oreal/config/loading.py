"""Reads a YAML file and its overrides into a configuration, and describes every mistake in one line."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json

from megatron_oreal.config.algorithms import ALGORITHM_SECTIONS, OutcomeConfig
from megatron_oreal.config.runs import EvalRunConfig, ModelRunConfig, SftConfig, TrainConfig

ConfigType = TypeVar("ConfigType", bound=ModelRunConfig)
# The old and the new places of sections of `train`.
MOVED = {"reward_model": "algorithm.reward_model", "critic": "algorithm.critic"}
COMMANDS: dict[type[ModelRunConfig], str] = {TrainConfig: "train", SftConfig: "sft", EvalRunConfig: "eval"}
# pydantic's names of these errors
SECTION_ERRORS = ("model_type", "model_attributes_type", "dict_type", "dataclass_type")
AUTO = "auto"  # When the run starts, it chooses the value of a setting that has this value.
# Settings that never had an effect, and the settings that replace them.
WITHDRAWN = {
    "algorithm.critic.updates_per_step": "algorithm.critic_minibatches and algorithm.critic_epochs",
    "rollout.mismatch_alarm": "alarms.mismatch",
}


def load_config(kind: type[ConfigType], path: Path, overrides: Sequence[str] = ()) -> ConfigType:
    """Builds a configuration from YAML and `section.key=value` overrides, whose values are YAML too.

    Relative paths stay relative to the working directory. Raises ValueError with one line that names the field and the
    fix.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; give a YAML configuration file")
    try:
        settings = read_yaml(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold sections and keys, not a {type(settings).__name__}")
    for override in overrides:
        apply_override(settings, override)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        other = command_of(settings, kind, error)
        hint = f"{path} is a configuration of `megatron-oreal {other}`: " if other else ""
        raise ValueError(hint + describe(error, kind)) from None


class UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a duplicate key in a mapping. YAML's own loader silently keeps the last value."""


def unique_mapping(loader: UniqueKeyLoader, node: yaml.MappingNode) -> dict[object, object]:
    lines: dict[object, int] = {}
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            line = key_node.start_mark.line + 1
            if key in lines:
                raise ValueError(f"{key!r} stands twice, in lines {lines[key]} and {line}; join the two")
            lines[key] = line
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


UniqueKeyLoader.add_constructor("tag:yaml.org,2002:map", unique_mapping)


def read_yaml(text: str) -> Any:
    """Reads plain YAML. Raises ValueError for a duplicate key, and yaml.YAMLError if the text is not YAML."""
    return yaml.load(text, UniqueKeyLoader)  # this is a safe loader


def command_of(settings: dict[str, Any], kind: type[BaseModel], error: ValidationError) -> str:
    """Names the command that the settings belong to, if it is not the command of `kind`."""
    unfit = [one for one in error.errors() if one["type"] in ("extra_forbidden", "missing")]
    for other, command in COMMANDS.items():
        if other is not kind and unfit:
            try:
                other.model_validate(settings)
            except ValidationError:
                continue
            return command
    return ""


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Writes "section.key=value" into the settings."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ValueError(f"override {override!r} must read section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        if settings.get(section) is None:
            settings[section] = {}
        settings = settings[section]
        if not isinstance(settings, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    try:
        settings[last] = parse_scalar(text)
    except yaml.YAMLError:
        raise ValueError(f"override {override!r}: {text!r} is not a YAML value; quote it") from None
    except ValueError as error:
        raise ValueError(f"override {override!r}: {error}") from None


# A value that begins with one of these is more than a plain text: quotes, braces, brackets, and other signs of YAML.
MARKS_OF_YAML = ("'", '"', "{", "[", "|", ">", "&", "*", "!", "?", "- ")


def parse_scalar(text: str) -> Any:
    """Reads a YAML value. Also reads numbers such as 1e-6, which YAML 1.1 treats as strings.

    Text without quotes stays unchanged, including blanks, colons and number signs: data.suffix=" Problem #1:".
    """
    value = read_yaml(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value if text.lstrip().startswith(MARKS_OF_YAML) else text
    is_comment = value is None and text.lstrip().startswith("#")
    if is_comment or (isinstance(value, dict) and not text.lstrip().startswith(MARKS_OF_YAML)):
        return text
    return value


def describe(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """Describes the first mistake in one line, and counts the others."""
    errors = error.errors()
    first = errors[0]
    location = without_tag(first["loc"])
    where = ".".join(str(part) for part in location)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden" and where in MOVED and kind is not None and issubclass(kind, TrainConfig):
        message = moved(where, first["input"])
    elif first["type"] == "extra_forbidden":
        message = f"unknown key {where!r}{suggestion(kind, first['loc'])}"
    elif first["type"] == "union_tag_invalid":
        message = unknown_algorithm(str(first["ctx"]["tag"]))
    elif first["type"] in SECTION_ERRORS and where == "algorithm":
        message = unknown_algorithm(str(first["input"]))
    elif first["type"] in SECTION_ERRORS:
        message = f"{where} is a section of settings, got {first['input']!r}: write {where}.SETTING=..."
    elif first["input"] is None:
        message = f"{where} is empty: give a value, or drop it to take its default"
    elif first["type"] == "missing":
        message = f"{where} is required: set it in the file or as {where}=..."
    elif first["type"] == "value_error":
        message = message if not where or message.startswith(where.split(".")[0]) else f"{where}.{message}"
    else:
        message = f"{where}: {message}, got {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(message.split()) + more


def unknown_algorithm(name: str) -> str:
    """Explains an unknown `algorithm.name`; objectives such as grpo are settings, not algorithms."""
    known = f"algorithm.name {name!r} is not known; known: {', '.join(ALGORITHM_SECTIONS)}"
    objectives = get_args(OutcomeConfig.model_fields["objective"].annotation)
    if name in objectives:
        return f"{name!r} is an objective: write algorithm={{name: outcome, objective: {name}}}"
    if name in ALGORITHM_SECTIONS:
        return f"algorithm is a section of settings: write algorithm={{name: {name}}}"
    return f"{known}; objectives of algorithm={{name: outcome, objective: ...}}: {', '.join(objectives)}"


def without_tag(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Removes the algorithm's name, which pydantic adds after "algorithm" in the paths of its fields."""
    return location[:1] + location[2:] if location[:1] == ("algorithm",) and len(location) > 1 else location


def moved(name: str, value: object) -> str:
    """Names the new place of a section that is given at its old place, e.g. `reward_model: {enabled: false}`."""
    settings = flatten(value, f"{MOVED[name]}.") if isinstance(value, dict) else {}
    example = next(iter(settings), MOVED[name])
    owners = [owner for owner, section in ALGORITHM_SECTIONS.items() if name in section.model_fields]
    return f"unknown key {name!r}: it is a section of algorithm.name={' or '.join(owners)}, write {example}=..."


def suggestion(kind: type[BaseModel] | None, location: tuple[int | str, ...]) -> str:
    """Suggests what an unknown key may mean: the setting that replaced it, its algorithm, or a similar key."""
    if place := WITHDRAWN.get(".".join(str(part) for part in without_tag(location))):
        return f"; set {place}"
    if location[0] == "algorithm" and len(location) > 1:
        algorithm, location = str(location[1]), location[2:]
        kind = ALGORITHM_SECTIONS[algorithm]
        owners = [name for name, section in ALGORITHM_SECTIONS.items() if location[0] in section.model_fields]
        if owners and algorithm not in owners:
            replaced = f"to replace the whole section, write algorithm={{name: {algorithm}}}"
            return f"; it belongs to algorithm.name={' or '.join(owners)}: {replaced}"
    for part in location[:-1]:
        field = kind.model_fields.get(str(part)) if kind else None
        kind = field.annotation if field and isinstance(field.annotation, type) else None
    if kind is None or not issubclass(kind, BaseModel):
        return ""
    known = list(kind.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def to_yaml(config: ModelRunConfig) -> str:
    """Returns the resolved configuration as YAML: every setting with its value."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)


def flatten(settings: object, prefix: str = "") -> dict[str, object]:
    """Turns nested settings into dotted ones: {"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(settings, dict):
        return {prefix.removesuffix("."): settings}
    flat: dict[str, object] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.")
    return flat


def read_resolved(text: str, config: ModelRunConfig) -> dict[str, object]:
    """Reads the config.yaml of a run, perhaps from an older version, as {"rollout.top_p": 1.0}.

    Sections are read at their new places, and sections that the algorithm does not have are left out. A setting that
    did not exist when the run began is missing in the file; it gets the value that describes what runs did then. This
    is its default in `config`, unless its section overrides it. A setting that is auto in the file or in `config` gets
    its value in `config`.
    """
    settings = yaml.safe_load(text)
    if isinstance(settings, dict) and isinstance(config, TrainConfig):
        settings = at_new_places(settings, config)
    found = {name: value for name, value in flatten(settings).items() if name not in WITHDRAWN}
    now = flatten(yaml.safe_load(to_yaml(config)))
    for name in now.keys() - found.keys():
        with contextlib.suppress(KeyError):  # an entry of a mapping such as eval.prompts has no default
            found[name] = json.loads(to_json(config.value_before_at(name)))
    # If either run leaves the choice to the device, the comparison ignores the setting.
    return found | {name: value for name, value in now.items() if AUTO in (value, found.get(name))}


def at_new_places(settings: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Moves each section of MOVED to its new place, and drops it if the algorithm does not have it."""
    algorithm = settings.get("algorithm") or {}
    moved_sections = {name: settings[name] for name in MOVED if name in settings}
    ours = {name: section for name, section in moved_sections.items() if name in config.algorithm.scalar_models}
    others = {name: value for name, value in settings.items() if name not in MOVED}
    return others | {"algorithm": algorithm | ours}
