from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import BenchmarkConfig, EvalRunConfig, load_config, to_yaml

EVAL = """
run_dir: runs/eval
model: {path: model}
eval: {prompts: {math500: math500.jsonl}}
"""


@pytest.mark.parametrize(
    ("settings", "pass_counts", "majority_counts"),
    [
        ({}, [2, 4, 8, 16], [16]),
        ({"num_samples": 0}, [], []),
        ({"num_samples": 1}, [], []),
        ({"num_samples": 2}, [2], [2]),
        ({"num_samples": 6}, [2, 4, 6], [6]),
        ({"num_samples": 6, "pass_at": [1, 5], "majority_at": [3]}, [1, 5], [3]),
        ({"pass_at": [], "majority_at": []}, [], []),
    ],
)
def test_what_is_measured(settings: dict[str, Any], pass_counts: list[int], majority_counts: list[int]) -> None:
    config = BenchmarkConfig.model_validate({"prompts": {"a": "a.jsonl"}} | settings)
    assert (config.pass_counts, config.majority_counts) == (pass_counts, majority_counts)


def test_a_configuration_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(EVAL)
    config = load_config(EvalRunConfig, path, ["eval.prompts.aime24=aime24.jsonl", "parallel.data=2"])
    assert list(config.eval.prompts) == ["math500", "aime24"]
    path.write_text(to_yaml(config))
    assert load_config(EvalRunConfig, path) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.num_sample=3"], "unknown key 'eval.num_sample'; did you mean 'num_samples'?"),
        (["eval.majority_at=[32]"], "eval.majority_at: 32 exceeds eval.num_samples=16; raise it"),
        (["eval.prompts={}"], "eval.prompts names no dataset: give eval.prompts.NAME=FILE.jsonl"),
        (["num_steps=3"], "unknown key 'num_steps'"),
    ],
)
def test_mistakes_name_the_field_and_the_fix(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = tmp_path / "eval.yaml"
    path.write_text(EVAL)
    with pytest.raises(ValueError) as error:
        load_config(EvalRunConfig, path, overrides)
    assert str(error.value).startswith(message)
