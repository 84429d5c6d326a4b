"""Which tokens and strings end a response, and which are refused because no response could end with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import RolloutConfig
from megatron_oreal.config.model_files import read_end_tokens
from megatron_oreal.run.inputs import sampling_params
from megatron_oreal.weights.families import read_architecture
from tests.support.small_tokenizers import EOS, IM_END, small_tokenizer
from tests.support.tiny_models import write_tiny_model


def end_tokens(folder: Path, config: Any, generation: Any) -> dict[int, str]:
    for name, value in {"config.json": config, "generation_config.json": generation}.items():
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
    return read_end_tokens(folder)


def test_both_files_of_the_model_name_end_tokens(tmp_path: Path) -> None:
    assert read_end_tokens(tmp_path) == {}
    own, other = "config.json", "generation_config.json"
    assert end_tokens(tmp_path, 3, [3, 7]) == {3: own, 7: other}
    assert end_tokens(tmp_path, [5, 6], 7) == {5: own, 6: own, 7: other}
    assert end_tokens(tmp_path, None, None) == end_tokens(tmp_path, -1, []) == {}
    for value in ("</s>", [1, "2"], True, 1.5, {"id": 2}):
        with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a number or a list"):
            end_tokens(tmp_path, 3, value)


def test_every_end_token_ends_a_response_each_once(tmp_path: Path) -> None:
    architecture = read_architecture(write_tiny_model(tmp_path / "model", tied=True))
    tokenizer = small_tokenizer(tmp_path)
    config = RolloutConfig(stop_tokens=["<|im_end|>"], stop_strings=["12"], max_total_tokens=9)
    params = sampling_params(config, tokenizer, architecture, {EOS: "config.json", 9: "generation_config.json"})
    assert params.stop_token_ids == (EOS, IM_END, 9)
    assert (params.stop_strings, params.max_total_tokens) == (("12",), 9)
    assert [params.longest_response(count) for count in (1, 8, 9, 12)] == [8, 1, 0, -3]
    with pytest.raises(ValueError, match=r"^model\.path: the generation_config\.json's end token 999 is beyond"):
        sampling_params(config, tokenizer, architecture, {999: "generation_config.json"})
    with pytest.raises(ValueError, match=rf"^model\.tokenizer: its end token {IM_END} is beyond .*vocab_size={IM_END}"):
        sampling_params(config, tokenizer, replace(architecture, vocab_size=IM_END), {})


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout\.stop_strings: an empty string is in every text"):
        RolloutConfig(stop_strings=["a", ""])
