"""The names that others rely on: each is imported from its place and takes the arguments that the pages promise."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_oreal.algorithms.advantages import gae, leave_one_out
from megatron_oreal.algorithms.objectives import h_prime, sample_weights, weights
from megatron_oreal.algorithms.oreal import token_weights
from megatron_oreal.cli import cli
from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig, load_config
from megatron_oreal.kernels import linear_logprob
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.types import Batch, Group, Microbatch, Prompt, Sample, Verdict
from tests.support.paths import ROOT

LOGPROB_DEFAULTS = {"tp_group": None, "temperature": 1.0, "valid_vocab": None, "entropy": False, "precision": "bf16"}


def parameters(function: Callable[..., object]) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (weights, ["objective", "group_size", "options"]),
        (h_prime, ["a", "b", "t"]),
        (sample_weights, ["objective", "rewards"]),
        (leave_one_out, ["rewards"]),
        (gae, ["rewards", "values", "mask", "discount", "gae_lambda"]),
        (token_weights, ["scores", "mask", "prefix_mean"]),
        (linear_logprob, ["hidden", "weight", "target"]),
        (MathVerifier, ["num_workers", "cpu_seconds"]),
        (MathVerifier.verify, ["self", "response", "answer"]),
        (MathVerifier.verify_many, ["self", "pairs"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_functions_take_the_promised_arguments(function: Callable[..., object], names: list[str]) -> None:
    assert parameters(function)[: len(names)] == names


def test_the_options_of_linear_logprob_are_keywords_with_their_defaults() -> None:
    options = inspect.signature(linear_logprob).parameters
    assert {name: options[name].default for name in LOGPROB_DEFAULTS} == LOGPROB_DEFAULTS
    assert all(options[name].kind is inspect.Parameter.KEYWORD_ONLY for name in LOGPROB_DEFAULTS)
    assert inspect.signature(token_weights).parameters["prefix_mean"].default is True


@pytest.mark.parametrize(
    ("dataclass", "names"),
    [
        (Prompt, {"id", "messages", "answer", "pass_rate", "source"}),
        (Verdict, {"reward", "status", "extracted"}),
        (
            Sample,
            {
                "prompt_id",
                "prompt_ids",
                "response_ids",
                "rollout_logprobs",
                "finish_reason",
                "policy_versions",
                "verdict",
            },
        ),
        (Group, {"prompt", "samples"}),
        (Microbatch, {"input_ids", "labels", "position_ids", "cu_seqlens", "loss_mask", "advantages", "is_correct"}),
        (Batch, {"microbatches", "num_sequences", "num_tokens", "num_correct_tokens", "num_incorrect_tokens"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_dataclasses_have_the_promised_fields(dataclass: type, names: set[str]) -> None:
    assert names <= {field.name for field in dataclasses.fields(dataclass)}


def test_a_verdict_is_made_by_position() -> None:
    assert Verdict(1.0, "correct", "2") == Verdict(reward=1.0, status="correct", extracted="2")


def test_commands_exist() -> None:
    assert {"train", "sft", "eval", "passrate", "serve", "compare", "objective", "view"} <= set(cli.commands)


def test_configurations_are_loaded_from_their_face() -> None:
    assert parameters(load_config) == ["kind", "path", "overrides"]
    assert {"run_dir", "model"} <= TrainConfig.model_fields.keys() & SftConfig.model_fields.keys()
    assert {"run_dir", "model"} <= EvalRunConfig.model_fields.keys()


def defined_names(module: Path) -> set[str]:
    """Names that a module defines, imports or assigns at its top level, also below `if` and `try`."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    return names


def missing_imports(script: Path) -> list[str]:
    """Names that the script imports from this repository and that are not there. Nothing is executed."""
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.module:
            continue
        if node.module.partition(".")[0] not in ("megatron_oreal", "tests", "tools", "examples"):
            continue
        place = ROOT.joinpath(*node.module.split("."))
        source = place / "__init__.py" if (place / "__init__.py").exists() else place.with_suffix(".py")
        known = defined_names(source) if source.exists() else set()
        for alias in node.names:
            is_module = (place / alias.name).is_dir() or (place / f"{alias.name}.py").exists()
            if alias.name not in known and not is_module:
                missing.append(f"{node.module}.{alias.name}")
    return missing


def test_an_import_of_a_name_that_is_gone_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("from megatron_oreal.types import Sample, Nothing\nfrom megatron_oreal import types\n")
    assert missing_imports(script) == ["megatron_oreal.types.Nothing"]


@pytest.mark.parametrize("folder", ["megatron_oreal", "tools", "examples", "tests"])
def test_every_import_of_our_own_names_finds_them(folder: str) -> None:
    """Type checks see the package alone; a benchmark that imports a renamed class would fail on its first run."""
    missing = {str(script.relative_to(ROOT)): missing_imports(script) for script in (ROOT / folder).rglob("*.py")}
    assert not {script: names for script, names in missing.items() if names}
