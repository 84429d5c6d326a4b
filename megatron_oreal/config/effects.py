"""Says when a setting has an effect. A setting that is given without effect is an error, like an unknown key.

Each section of the configuration has a table `effects`, whose rows name settings and the condition under which they
act. A setting that is in no row always acts. A condition sees only its own section; TrainConfig, SftConfig and
EvalRunConfig have the rows whose condition lies in another section.

Two kinds of settings are not errors although they have no effect: values that request nothing (null, no frozen steps),
and settings of a section that is turned off as a whole, which act again when the section is turned on. The switches are
rollout.engine, eval.prompts and algorithm.reward_model.enabled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Condition:
    """The situation in which a setting acts.

    holds: is called with the section whose table has the row.
    words: is called with the section and with where it stands ("algorithm."), and says what is the case instead and
        what would help, for example "for algorithm.kl_coef=0: drop it, or raise algorithm.kl_coef".
    sentence: is called with where it stands, and says for the reference of settings when the settings act, for example
        "Acts where algorithm.kl_coef > 0."
    """

    holds: Callable[[Any], bool]
    words: Callable[[Any, str], str]
    sentence: Callable[[str], str]


Effects = tuple[tuple[tuple[str, ...], Condition], ...]  # rows of (settings, when they act)


@dataclass(frozen=True, slots=True)
class IdleSetting:
    """A setting without effect, for example algorithm.top_k_ratio with algorithm.token_weights=threshold."""

    name: str  # the whole path, "algorithm.top_k_ratio"
    is_given: bool  # its value is not its default; null counts as the default, because it requests nothing
    words: str  # why the setting has no effect, and how to fix it


def choice(setting: str, *values: Any) -> Condition:
    """Makes a condition: the settings of the row act if `setting` has one of these values."""

    def words(section: Any, where: str) -> str:
        name, fitting = f"{where}{setting}", " or ".join(map(as_yaml, values))
        return f"for {name}={as_yaml(value_at(section, setting))}: drop it, or set {name} to {fitting}"

    def sentence(where: str) -> str:
        return f"Acts where {where}{setting} is {' or '.join(map(as_yaml, values))}."

    return Condition(lambda section: value_at(section, setting) in values, words, sentence)


def positive(setting: str) -> Condition:
    """Makes a condition: the settings of the row act if the number `setting` is above zero."""

    def words(_section: Any, where: str) -> str:
        return f"for {where}{setting}=0: drop it, or raise {where}{setting}"

    return Condition(
        lambda section: value_at(section, setting) > 0, words, lambda where: f"Acts where {where}{setting} > 0."
    )


def condition(holds: Callable[[Any], bool], words: str) -> Condition:
    """Makes a condition from `words`, which follow "SETTING has no meaning "; {at} in them is the section's path."""

    def sentence(where: str) -> str:
        return f"Has no effect {words.partition(': ')[0].replace('{at}', where)}."

    return Condition(holds, lambda _section, where: words.replace("{at}", where), sentence)


def never(words: str) -> Condition:
    """Makes a condition under which the settings of the row never act."""
    return condition(lambda _section: False, words)


def value_at(section: Any, path: str) -> Any:
    """Returns the value of a setting such as "reward_model.enabled", whose path starts at `section`."""
    for name in path.split("."):
        section = getattr(section, name)
    return section


def as_yaml(value: Any) -> str:
    """Returns the value as YAML spells it: true, not True."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)
