"""A server of another model is refused, whichever setting of config.json makes it another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.engines.sglang.server_checks import check_model, check_overrides

OURS = {"model_type": "qwen2", "hidden_size": 32, "num_hidden_layers": 2, "rope_theta": 10000.0, "rms_norm_eps": 1e-6}


def write(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def check(folder: Path, **changes: Any) -> None:
    ours, served = write(folder / "ours", OURS), write(folder / "served", OURS | changes)
    check_model({"model_type": "qwen2", "model_path": str(served)}, ours, "server 1")


@pytest.mark.parametrize(
    ("key", "value"),
    [("hidden_size", 64), ("rope_theta", 500.0), ("rms_norm_eps", 1e-5), ("num_hidden_layers", 3)],
)
def test_a_setting_that_changes_the_function_is_refused(tmp_path: Path, key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"server 1 has another model \\({key} {value}"):
        check(tmp_path, **{key: value})


def test_other_settings_may_differ(tmp_path: Path) -> None:
    check(tmp_path, transformers_version="5.0", torch_dtype="bfloat16", use_cache=False, tie_word_embeddings=False)


@pytest.mark.parametrize("is_used", [True, False])
def test_a_window_counts_where_it_is_used(tmp_path: Path, is_used: bool) -> None:
    window: dict[str, Any] = {"use_sliding_window": is_used, "sliding_window": 4096, "max_window_layers": 28}
    ours = write(tmp_path / "ours", OURS | window)
    served = write(tmp_path / "served", OURS | window | {"sliding_window": None})
    if is_used:
        with pytest.raises(ValueError, match=r"sliding_window None, model\.path has 4096"):
            check_model({"model_type": "qwen2", "model_path": str(served)}, ours, "server 1")
    else:
        check_model({"model_type": "qwen2", "model_path": str(served)}, ours, "server 1")


@pytest.mark.parametrize("given", ['{"rope_theta": 500.0}', {"rope_theta": 500.0}, '{"rope_scaling": {"factor": 2}}'])
def test_a_flag_that_changes_the_function_is_refused(tmp_path: Path, given: Any) -> None:
    ours = write(tmp_path / "ours", OURS)
    with pytest.raises(ValueError, match="server 1 has another model \\(its flag json-model-override-args sets rope_"):
        check_overrides({"json_model_override_args": given}, ours, "server 1")
    for same in ({}, {"json_model_override_args": "{}"}, {"json_model_override_args": '{"rope_theta": 10000.0}'}):
        check_overrides(same, ours, "server 1")
