"""No run on one machine listens for the network, and its ranks trust nobody there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.listening import watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line


@pytest.mark.parametrize("tensor", [1, 2])
def test_a_run_listens_on_loopback_alone(sft_config: dict[str, Any], tmp_path: Path, tensor: int) -> None:
    settings = sft_config | {"run_dir": str(tmp_path / "run"), "num_steps": 2, "parallel": {"tensor": tensor}}
    settings["eval"] = settings["eval"] | {"every": 2}  # the local engine generates
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_oreal.cli", "sft", str(tmp_path / "config.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        seen = watch(process)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == 3 and "eval/heldout/greedy" in records[-1]
    assert seen, "gloo listens in any case"
    assert [listener for listener in seen if not listener.address.is_loopback] == []
