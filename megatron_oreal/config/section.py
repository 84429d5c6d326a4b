"""The base class of all sections of the configuration."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=False, validate_default=False, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def read_empty_sections(cls, settings: Any) -> Any:
        """`eval:` with nothing below it is YAML's null; it means the defaults."""
        if not isinstance(settings, dict):
            return settings
        empty = {name for name, value in settings.items() if value is None and name in cls.model_fields}
        return settings | {name: {} for name in empty if is_section(cls.model_fields[name].annotation)}


def is_section(annotation: Any) -> bool:
    """A nested section, or a mapping such as eval.prompts."""
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, (Section, dict))
