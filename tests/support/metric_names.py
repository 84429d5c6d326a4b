"""Reads the metric names on docs/metrics.md."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from tests.support.paths import ROOT

PREFIXES = ("reward", "rollout", "verifier", "judge", "policy", "reward_model", "critic", "train", "eval", "time")


@cache
def documented() -> tuple[str, ...]:
    """Returns the names in the first column of the tables, with placeholders such as <dataset>."""
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    return tuple(rows)


@cache
def patterns() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile("[^/]+".join(map(re.escape, re.split(r"<\w+>", name)))) for name in documented())


def is_documented(name: str) -> bool:
    return any(found.fullmatch(name) for found in patterns())


def unknown_names(names: Iterable[str]) -> list[str]:
    """Returns the names of a record that docs/metrics.md does not list."""
    return [name for name in names if name != "step" and not is_documented(name)]
