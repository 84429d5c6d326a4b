"""Names of data sets become names of files: none leads out of the run directory, wherever in the name it would."""

from __future__ import annotations

import pytest

from megatron_oreal.config import BenchmarkConfig
from megatron_oreal.config.evaluation import DATASET_NAME

WRONG = [
    "ok/../../x",
    "ok/x",
    "/x",
    "..",
    ".hidden",
    "",
    "ok\n",
    "ok\x00",
    "ok x",
    "ok\\x",
    "~",
    "-x",
    "ok:x",
    "a/../b",
]
RIGHT = ["math500", "aime24", "a.b", "v1.5_x+y-z", "a..b", "π"]


@pytest.mark.parametrize("name", WRONG)
def test_names_that_would_be_other_files_are_refused(name: str) -> None:
    assert not DATASET_NAME.fullmatch(name)
    with pytest.raises(ValueError, match=r"eval\.prompts: .* cannot name a file; use letters, digits and"):
        BenchmarkConfig.model_validate({"prompts": {"good": "a.jsonl", name: "b.jsonl"}})


@pytest.mark.parametrize("name", RIGHT)
def test_names_that_are_files_are_taken(name: str) -> None:
    assert list(BenchmarkConfig.model_validate({"prompts": {name: "a.jsonl"}}).prompts) == [name]


def test_something_must_be_measured() -> None:
    with pytest.raises(ValueError, match=r"eval\.num_samples=0 with eval\.greedy=false measures nothing"):
        BenchmarkConfig.model_validate({"prompts": {"a": "a"}, "num_samples": 0, "greedy": False})
    with pytest.raises(ValueError, match=r"eval\.pass_at: 17 exceeds eval\.num_samples=16; raise it"):
        BenchmarkConfig.model_validate({"prompts": {"a": "a"}, "pass_at": [1, 17]})
