"""The examples' configurations are valid."""

from pathlib import Path

import pytest

from megatron_oreal.config import EvalRunConfig, ModelRunConfig, SftConfig, TrainConfig, load_config, to_yaml
from tests.support.paths import EXAMPLES

FILES = pytest.mark.parametrize(
    "file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(EXAMPLES))
)


def kind_of(file: Path) -> type[ModelRunConfig]:
    if "sft" in file.name:
        return SftConfig
    return EvalRunConfig if file.name in ("generate.yaml", "eval.yaml") else TrainConfig


@FILES
def test_the_configuration_is_valid(file: Path) -> None:
    load_config(kind_of(file), file)


@FILES
def test_the_resolved_configuration_is_read_as_it_was_written(file: Path, tmp_path: Path) -> None:
    config = load_config(kind_of(file), file)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(kind_of(file), tmp_path / "config.yaml") == config
