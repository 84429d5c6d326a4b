"""mcore2hf --fp8-blocks: transformers and SGLang read it as it is meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from megatron_oreal.weights.stream_filters import fp8_blocks
from tests.conversion.test_conversion import run
from tests.support.paths import ROOT, SGLANG_PYTHON
from tests.support.tiny_checkpoints import write_checkpoint

SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2, "num_key_value_heads": 1,
         "head_dim": 128, "moe_intermediate_size": 128}  # fmt: skip

# With SGLang's own code, from its own environment: reads the configuration, dequantises, writes what it makes of it.
SGLANG_PROGRAM = """
import importlib.util, json, sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("stand_ins", sys.argv[1])
stand_ins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_ins)
stand_ins.install_stand_ins()
import torch
from safetensors.torch import load_file, save_file
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant

folder = Path(sys.argv[2])
config = Fp8Config.from_config(json.loads((folder / "config.json").read_text())["quantization_config"])
assert config.is_checkpoint_fp8_serialized and config.activation_scheme == "dynamic"
tensors = load_file(folder / "model.safetensors")
whole = {}
for name, tensor in tensors.items():
    scale = tensors.get(name + "_scale_inv")
    if scale is not None:
        tensor = block_quant_dequant(tensor, scale, config.weight_block_size, torch.float32)
    if not name.endswith("_scale_inv"):
        whole[name] = tensor
save_file(whole, sys.argv[3])
"""


def convert(folder: Path, model: str) -> dict[str, Tensor]:
    """The original tensors, every quantised weight replaced by what its blocks stand for."""
    hf = write_checkpoint(folder / "hf", model, num_files=1, **SIZES)
    conversion.hf_to_megatron(hf, folder / "mcore", ConversionOptions())
    conversion.megatron_to_hf(folder / "mcore", folder / "fp8", ConversionOptions(fp8_blocks=True))
    original = load_file(hf / "model.safetensors")
    written = load_file(folder / "fp8" / "model.safetensors")
    expected = {}
    for name, tensor in original.items():
        expected[name] = tensor
        if f"{name}_scale_inv" in written:
            quantised, scales = fp8_blocks(tensor, 128)
            assert torch.equal(written[name].view(torch.uint8), quantised.view(torch.uint8))
            expected[name] = quantised.float() * torch.kron(scales, torch.ones(128, 128))
            assert (expected[name] - tensor).abs().max() < 0.04 * tensor.abs().max()
    return expected


def test_transformers_reads_the_blocks(tmp_path: Path) -> None:
    """With the operation of its loader: the loader itself asks for accelerate."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    expected = convert(tmp_path, "qwen2")
    written = load_file(tmp_path / "fp8" / "model.safetensors")
    scales = [name for name in written if name.endswith("_scale_inv")]
    assert len(scales) == 4 * 7
    for scale in scales:
        name = scale.removesuffix("_scale_inv")
        found = Fp8Dequantize(None)._dequantize_one(written[name], written[scale], torch.float32)
        assert torch.equal(found, expected[name]), name


@pytest.mark.slow
@pytest.mark.sglang
def test_sglang_reads_the_blocks(tmp_path: Path) -> None:
    expected = convert(tmp_path, "qwen3_moe")
    launcher = ROOT / "megatron_oreal" / "engines" / "sglang" / "servers" / "launcher.py"
    command = [SGLANG_PYTHON, "-c", SGLANG_PROGRAM, launcher, tmp_path / "fp8", tmp_path / "read.safetensors"]
    environment = os.environ | {"SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "read.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_linears_are_quantised_and_the_configuration_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(tmp_path, "qwen3_moe")
    written = load_file(tmp_path / "fp8" / "model.safetensors")
    kept = {name for name, tensor in written.items() if tensor.dtype == torch.float32 and "scale_inv" not in name}
    assert {name.split(".")[-2] for name in kept} == {
        "embed_tokens", "norm", "lm_head", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "gate",
    }  # fmt: skip
    settings = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert settings["weight_block_size"] == [128, 128] and settings["quant_method"] == "fp8"
    assert settings["modules_to_not_convert"] == ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(4))]
    # Our own readers would lose the scales.
    assert run("hf2mcore", "--hf", tmp_path / "fp8", "--out", tmp_path / "out", monkeypatch=monkeypatch) == 2
    assert "quantization_config" in capsys.readouterr().err


def test_what_is_not_made_of_blocks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conversion.hf_to_megatron(write_checkpoint(tmp_path / "hf", "llama"), tmp_path / "mcore", ConversionOptions())
    arguments = ("mcore2hf", "--mcore", tmp_path / "mcore", "--out", tmp_path / "out", "--fp8-blocks")
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err.splitlines()
    assert "q_proj.weight" in errors[-1] and "128 x 128" in errors[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "mcore"}
    assert "sglang" not in sys.modules
