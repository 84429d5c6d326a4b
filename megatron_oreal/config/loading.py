"""Reads a YAML file and its overrides into a configuration, and names every mistake in one line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megatron_oreal.config.algorithms import OrealConfig, OutcomeConfig, PpoConfig
from megatron_oreal.config.runs import ModelRunConfig
from megatron_oreal.config.section import Section

ALGORITHMS: dict[str, type[Section]] = {"oreal": OrealConfig, "outcome": OutcomeConfig, "ppo": PpoConfig}
ConfigType = TypeVar("ConfigType", bound=ModelRunConfig)


def load_config(kind: type[ConfigType], path: Path, overrides: Sequence[str] = ()) -> ConfigType:
    """Builds a configuration from YAML and `section.key=value` overrides, whose values are YAML too.

    Relative paths stay relative to the working directory. Raises ValueError, one line, naming the field and the fix.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a YAML configuration file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold sections and keys, not a {type(settings).__name__}")
    for override in overrides:
        apply_override(settings, override)
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        raise ValueError(describe(error, kind)) from None


def apply_override(settings: dict[str, Any], override: str) -> None:
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


def parse_scalar(text: str) -> Any:
    """YAML, and numbers such as 1e-6 that YAML 1.1 takes for strings."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def describe(error: ValidationError, kind: type[BaseModel] | None = None) -> str:
    """The first thing that is wrong, in one line, and how many more there are."""
    errors = error.errors()
    first = errors[0]
    location = without_tag(first["loc"])
    where = ".".join(str(part) for part in location)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"unknown key {where!r}{suggestion(kind, first['loc'])}"
    elif first["type"] == "missing":
        message = f"{where} is required: set it in the file or as {where}=..."
    elif first["type"] == "value_error":
        message = message if not where or message.startswith(where.split(".")[0]) else f"{where}.{message}"
    else:
        message = f"{where}: {message}, got {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return " ".join(message.split()) + more


def without_tag(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """pydantic puts an algorithm's name behind "algorithm" in the paths of its fields."""
    return location[:1] + location[2:] if location[:1] == ("algorithm",) and len(location) > 1 else location


def suggestion(kind: type[BaseModel] | None, location: tuple[int | str, ...]) -> str:
    if location[0] == "algorithm" and len(location) > 1:
        kind, location = ALGORITHMS[str(location[1])], location[2:]
    for part in location[:-1]:
        field = kind.model_fields.get(str(part)) if kind else None
        kind = field.annotation if field and isinstance(field.annotation, type) else None
    if kind is None or not issubclass(kind, BaseModel):
        return ""
    known = list(kind.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def to_yaml(config: ModelRunConfig) -> str:
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False, allow_unicode=True)
