"""docs/metrics.md against the program, in both directions, read from the sources: no run is needed.

A metric is a string constant or an f-string of the package that begins with one of PREFIXES, or a component of a loss,
which a model writes as `<model>/<component>`. A part of a name in braces or in angle brackets stands for any text.
The fixture `command_line` of tests/integration compares the records of real runs with the page too.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from megatron_oreal.engines.sglang.request_statistics import COUNTS
from megatron_oreal.rewards.json_client import COUNTED
from megatron_oreal.rollout.metrics import JUDGED_AS
from tests.support.metric_names import PREFIXES, documented, is_documented, unknown_names
from tests.support.paths import ROOT

PACKAGE = ROOT / "megatron_oreal"
# These read metrics and log none.
READERS = {
    "reports",
    "config/runs.py",
    "run/inputs.py",
    "types.py",
    "algorithms/metrics.py",
    "observability/alarms.py",
}
# A tag of texts, and what other names begin with.
NO_METRIC = {"eval/{}/{}", "policy/importance", "time/judge", "time/remote"}
# The first part of their names is filled in.
PREFIXED = {"rewards/json_client.py", "models/trainable.py"}
HOLE = "{}"


def sources() -> list[Path]:
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not any(str(path.relative_to(PACKAGE)).startswith(reader) for reader in READERS)
    ]


def texts(tree: ast.AST) -> set[str]:
    """String constants, and f-strings with {} for what is filled in; docstrings have blanks and match no name."""
    formatted = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in formatted for part in node.values}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in parts]
    whole = {node.value for node in constants if isinstance(node.value, str)}
    return whole | {
        "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        for node in formatted
    }


def logged_names() -> set[str]:
    found = set()
    for path in sources():
        is_prefixed = str(path.relative_to(PACKAGE)) in PREFIXED
        first = "|".join([*PREFIXES, re.escape(HOLE)] if is_prefixed else PREFIXES)
        # A hole may follow a known first part, but not a hole.
        begins = re.compile(rf"({first})/\w[\w{{}}@/]*|({'|'.join(PREFIXES)})/{{}}[\w{{}}@/]*")
        found |= {text for text in texts(ast.parse(path.read_text())) if begins.fullmatch(text)}
    return found - NO_METRIC


def loss_components() -> set[str]:
    """The keys of the dictionaries that losses return, and of those that they add to them."""
    found = set()
    for path in (PACKAGE / "algorithms").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict) and node.values:
                keys = {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
                found |= {key for key in keys if re.fullmatch(r"[a-z_0-9]+", key)}
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "metrics":
                found |= {part.value for part in [node.slice] if isinstance(part, ast.Constant)}
    return found


def pattern(name: str) -> re.Pattern[str]:
    return re.compile("[^{}]+".join(map(re.escape, re.split(r"\{\}|<\w+>", name))))


def could_be(name: str, text: str) -> bool:
    """Whether a name of the page and a text of the program may be one metric."""
    filled = re.sub(r"<\w+>", "x", name)
    return bool(pattern(text).fullmatch(filled) or pattern(name).fullmatch(text.replace(HOLE, "x")))


def test_every_metric_of_the_program_is_on_the_page() -> None:
    missing = [text for text in sorted(logged_names()) if not any(could_be(name, text) for name in documented())]
    assert not missing, (
        f"docs/metrics.md has no row for {missing}: add one with unit, healthy pattern, red flag, advice"
    )


def test_every_metric_on_the_page_is_logged() -> None:
    logged, components = logged_names(), loss_components() | {"grad_norm", "lr"}
    unknown = [
        name
        for name in documented()
        if not any(could_be(name, text) for text in logged)
        and not (
            name.split("/")[0] in ("policy", "reward_model", "critic", "<model>") and name.split("/")[1] in components
        )
    ]
    assert not unknown, f"docs/metrics.md has rows that nothing logs: {unknown}"


def test_names_that_are_filled_in_are_on_the_page() -> None:
    names = [f"rollout/{name}" for name in COUNTS]
    names += [f"time/{server}/num_{name}" for server in ("judge", "remote") for name in COUNTED]
    names += [f"judge/aime/{name}" for name in JUDGED_AS.values()]
    assert not unknown_names(names)


def test_each_phase_of_a_step_is_on_the_page() -> None:
    calls = re.findall(r"run\.timer\(\"(\w+)\"\)", (PACKAGE / "train.py").read_text())
    phases = {re.fullmatch(r"time/(\w+)_seconds", name) for name in documented()} - {None}
    assert {found.group(1) for found in phases if found} == {*calls, "other", "step"}


def test_a_name_is_documented_once() -> None:
    assert len(documented()) == len(set(documented()))


def test_holes_match_one_part() -> None:
    assert is_documented("eval/gsm8k/greedy") and is_documented("rollout/server12_tokens_per_second")
    assert is_documented("reward_model/grad_norm") and is_documented("judge/aime-24/overruled")
    assert unknown_names(["step", "eval/a/b/greedy", "policy/new", "reward/mean"]) == ["eval/a/b/greedy", "policy/new"]


def test_the_sources_are_read() -> None:
    names = logged_names()
    assert {"reward/mean", "reward/pass_at_{}", "time/{}_seconds", "train/skipped"} <= names
    assert {
        "loss_positive",
        "mismatch_kl_k3",
        "kl",
        "covariance_penalty",
        "importance_capped_share",
    } <= loss_components()


def test_every_row_is_whole() -> None:
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    assert rows and all(line.count("|") == 7 and line.split("|")[3].strip() for line in rows)
