"""The base class of all sections of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, get_origin

from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from megatron_oreal.config.effects import Effects, IdleSetting


class Section(BaseModel):
    """A section of the configuration: named settings, each with a type, a default and its allowed values."""

    model_config = ConfigDict(
        extra="forbid", strict=False, validate_default=False, protected_namespaces=(), allow_inf_nan=False
    )
    effects: ClassVar[Effects] = ()  # when the settings of this section act; a setting in no row always acts

    @model_validator(mode="before")
    @classmethod
    def read_empty_sections(cls, settings: Any) -> Any:
        """Reads `eval:` with nothing below it, which is YAML's null, as a section with its defaults."""
        if not isinstance(settings, dict):
            return settings
        empty = {name for name, value in settings.items() if value is None and name in cls.model_fields}
        return settings | {name: {} for name in empty if is_section(cls.model_fields[name].annotation)}

    @field_validator("*", mode="after")
    @classmethod
    def expand_home(cls, value: Any) -> Any:
        """Replaces `~` by the home directory, as a shell does, in every path and in the paths of mappings."""
        if isinstance(value, dict):
            return {name: in_home(entry) for name, entry in value.items()}
        return in_home(value)

    def effect_rows(self) -> Effects:
        """Returns the rows of this section's table and of the tables of the sections that it extends."""
        return tuple(row for section in type(self).__mro__ for row in section.__dict__.get("effects", ()))

    def default_of(self, name: str) -> Any:
        """Returns the value of a setting that neither the file nor the command line gives."""
        return type(self).model_fields[name].get_default(call_default_factory=True)

    def value_before(self, name: str) -> Any:
        """Returns what runs did before the setting existed: its default, unless a section overrides this function."""
        return self.default_of(name)

    def value_before_at(self, path: str) -> Any:
        """Returns the default of, for example, "policy.optimizer.lr". Raises KeyError for a name without a default."""
        name, _, rest = path.partition(".")
        field = type(self).model_fields.get(name)
        if rest and field is not None and isinstance(section := getattr(self, name), Section):
            return section.value_before_at(rest)
        if rest or field is None or field.is_required():
            raise KeyError(path)
        return self.value_before(name)

    def idle_settings(self, where: str = "") -> Iterator[IdleSetting]:
        """Returns the settings of this section and its nested sections that have no effect here, given or not."""
        for settings, acts in self.effect_rows():
            if not acts.holds(self):
                words = acts.words(self, where)
                for name, is_given in (leaf for setting in settings for leaf in self.leaves(setting)):
                    yield IdleSetting(f"{where}{name}", is_given, words)
        for name, value in self:
            if isinstance(value, Section):
                yield from value.idle_settings(f"{where}{name}.")

    def leaves(self, path: str) -> Iterator[tuple[str, bool]]:
        """Returns the settings at and below `path`, and whether each one has a value other than its default."""
        name, _, rest = path.partition(".")
        value = getattr(self, name)
        if isinstance(value, Section):
            for below in [rest] if rest else type(value).model_fields:
                yield from ((f"{name}.{leaf}", is_given) for leaf, is_given in value.leaves(below))
        else:
            yield name, value is not None and value != self.default_of(name)

    def refuse_idle_settings(self, where: str = "") -> None:
        """Raises ValueError, with one line, for the first given setting that has no effect."""
        for idle in self.idle_settings(where):
            if idle.is_given:
                raise ValueError(f"{idle.name} has no meaning {idle.words}")


def is_section(annotation: Any) -> bool:
    """Says whether a field is a nested section, or a mapping such as eval.prompts."""
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, (Section, dict))


def in_home(value: Any) -> Any:
    """Returns the path with `~` and `~user` replaced. Raises ValueError for a user that the system does not know."""
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError:
        raise ValueError(f"{value}: this system knows no home directory of {value.parts[0]}; give the path") from None
