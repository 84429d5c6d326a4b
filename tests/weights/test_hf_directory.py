"""What an exported Hugging Face directory holds beside the weights."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

import pytest
import torch

from megatron_oreal.weights.hf_directory import save_hf


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_config_json_names_the_dtype_of_the_weights(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source, out = tmp_path / "source", tmp_path / "hf"
    source.mkdir()
    settings = {"model_type": "qwen2", name: "bfloat16", "note": "\ud800"}
    (source / "config.json").write_bytes(codecs.BOM_UTF8 + json.dumps(settings).encode())
    before = os.umask(0o022)
    try:
        save_hf([("a", torch.ones(2, 2, dtype=dtype)), ("b", torch.ones(1))], source, source, out, True)
    finally:
        os.umask(before)
    assert json.loads((out / "config.json").read_bytes()) == settings | {name: str(dtype).removeprefix("torch.")}
    assert {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()} == {
        "config.json": 0o644,
        "model.safetensors": 0o644,
    }
