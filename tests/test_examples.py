"""The examples' configurations are valid."""

from pathlib import Path

import pytest

from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig, load_config
from tests.support.paths import EXAMPLES


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda file: str(file.relative_to(EXAMPLES)))
def test_the_configuration_is_valid(file: Path) -> None:
    if "sft" in file.name:
        load_config(SftConfig, file)
    elif file.name == "generate.yaml":
        load_config(EvalRunConfig, file)
    else:
        load_config(TrainConfig, file)
