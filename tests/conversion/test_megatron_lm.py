"""What Megatron-LM's --load with --ckpt-format torch_dist reads besides the tensors, which load_worker.py loads."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from tests.support.tiny_checkpoints import write_checkpoint

# Compared with the arguments of a run, without which check_checkpoint_args fails; by default and with --vocab-file.
COMPARED = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "add_position_embedding": True,
    "max_position_embeddings": 128,
    "make_vocab_size_divisible_by": 128,
    "data_parallel_random_init": False,
}


def common_of(folder: Path, model: str, **changes: Any) -> dict[str, Any]:
    hf = write_checkpoint(folder / "hf", model, **changes)
    conversion.hf_to_megatron(hf, folder / "mcore", ConversionOptions())
    with torch.serialization.safe_globals([Namespace]):  # as torch.load has it by default: nothing else may be there
        common: dict[str, Any] = torch.load(folder / "mcore" / "release" / "common.pt", weights_only=True)
    return common


def test_a_release_of_the_right_format_without_optimizer_and_random_state(tmp_path: Path) -> None:
    common = common_of(tmp_path, "qwen2")
    assert (tmp_path / "mcore" / "latest_checkpointed_iteration.txt").read_text() == "release"
    release = tmp_path / "mcore" / "release"
    settings = json.loads((release / "metadata.json").read_text())
    assert settings["sharded_backend"] == "torch_dist" and settings["sharded_backend_version"] == 1
    assert not list(release.glob("mp_rank_*")) and (release / ".metadata").is_file()
    assert common["checkpoint_version"] == 3.0 and common["iteration"] == 0
    # sharded_state_dict() is called with it, and with a group that is added to it.
    assert common["content_metadata"] == {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": False,
    }
    assert common["args"].no_save_optim and common["args"].no_save_rng
    assert not {"optimizer", "opt_param_scheduler", "rng_state"} & common.keys()


@pytest.mark.parametrize("model", ["qwen2", "qwen2-tied", "qwen3", "llama", "qwen3_moe"])
def test_the_compared_arguments_are_there(tmp_path: Path, model: str) -> None:
    arguments = vars(common_of(tmp_path, model)["args"])
    assert {name: arguments[name] for name in COMPARED} == COMPARED
    assert (arguments["tensor_model_parallel_size"], arguments["pipeline_model_parallel_size"]) == (1, 1)
    plain = (int, float, bool, str, type(None))
    assert all(isinstance(value, plain) for value in arguments.values())
    assert "tokenizer_type" not in arguments


def test_arguments_for_use_checkpoint_args(tmp_path: Path) -> None:
    llama = vars(common_of(tmp_path / "llama", "llama")["args"])
    expected = {
        "ffn_hidden_size": 48, "num_query_groups": 2, "group_query_attention": True, "kv_channels": 8,
        "position_embedding_type": "rope", "rotary_base": 500_000, "rotary_percent": 1.0, "normalization": "RMSNorm",
        "swiglu": True, "add_bias_linear": False, "add_qkv_bias": False, "attention_dropout": 0.0,
        "hidden_dropout": 0.0, "untie_embeddings_and_output_weights": True, "padded_vocab_size": 128,
        "num_experts": None, "use_rope_scaling": True, "rope_scaling_factor": 4.0,
    }  # fmt: skip
    assert {name: llama[name] for name in expected} == expected
    assert isinstance(llama["rotary_base"], int)
    moe = vars(common_of(tmp_path / "moe", "qwen3_moe", norm_topk_prob=False)["args"])
    expected = {"num_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 24, "moe_router_pre_softmax": True}
    assert {name: moe[name] for name in expected} == expected
    assert not vars(common_of(tmp_path / "other", "qwen3_moe")["args"])["moe_router_pre_softmax"]
