"""Runs start from Hugging Face and from torch_dist directories alike; every rank reads its own slices."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from megatron_oreal.engines.local.engine import load_decoder
from megatron_oreal.weights.families import parameters, read_architecture
from megatron_oreal.weights.initial import check_trunk, hf_weights, open_weights
from megatron_oreal.weights.mapping import padded_vocabulary
from tests.conversion.test_conversion import tensors_of
from tests.support.tiny_checkpoints import MODELS, write_checkpoint


@pytest.mark.parametrize("model", MODELS)
def test_a_ranks_slices_are_the_same_from_both(tmp_path: Path, model: str) -> None:
    hf, mcore = write_checkpoint(tmp_path / "hf", model), tmp_path / "mcore"
    conversion.hf_to_megatron(hf, mcore, ConversionOptions())
    architecture = read_architecture(mcore)  # the directory is enough by itself
    one, other = open_weights(hf, architecture), open_weights(mcore, architecture)
    for size in (1, 2):
        padded_rows = padded_vocabulary(architecture.vocab_size, size)
        for row, place in parameters(architecture, "lm"):
            for rank in range(size):
                expected = one.shard(row, place, padded_rows, rank, size)
                assert torch.equal(other.shard(row, place, padded_rows, rank, size), expected), row.megatron
    streamed = dict(hf_weights(mcore, architecture))
    assert streamed.keys() == tensors_of(hf).keys()
    assert all(torch.equal(streamed[name], tensor) for name, tensor in tensors_of(hf).items())


def test_the_head_is_the_noted_one(tmp_path: Path) -> None:
    for head in ("lm", "scalar"):
        hf = write_checkpoint(tmp_path / head, "qwen2", head=head)
        conversion.hf_to_megatron(hf, tmp_path / f"{head}-mcore", ConversionOptions(), head)
        for path in (hf, tmp_path / f"{head}-mcore"):
            assert open_weights(path, read_architecture(path)).has_head("scalar") == (head == "scalar")


@pytest.mark.parametrize("model", ["qwen2", "llama", "qwen3", "mistral"])
def test_the_local_engine_loads_both(tmp_path: Path, model: str) -> None:
    """qwen2 and llama in the lean decoder, the others in transformers'."""
    hf, mcore = write_checkpoint(tmp_path / "hf", model), tmp_path / "mcore"
    conversion.hf_to_megatron(hf, mcore, ConversionOptions())
    prompts, padding, rows = torch.tensor([[5, 6, 7]]), torch.tensor([0]), torch.tensor([0])
    decoders = [load_decoder(path, torch.device("cpu"), torch.float32) for path in (hf, mcore)]
    for name, parameter in decoders[0].parameters.items():
        assert torch.equal(decoders[1].parameters[name], parameter), name
    logits = []
    for decoder in decoders:
        first, decoding = decoder.start(prompts, padding, rows)
        logits.append(torch.cat([first, decoding.advance(torch.tensor([8]))]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_damage_is_a_users_mistake_that_names_the_setting(tmp_path: Path) -> None:
    hf, mcore = write_checkpoint(tmp_path / "hf", "qwen2"), tmp_path / "mcore"
    conversion.hf_to_megatron(hf, mcore, ConversionOptions())
    architecture = read_architecture(mcore)
    other = write_checkpoint(tmp_path / "other", "qwen2", intermediate_size=64)
    with pytest.raises(ValueError, match=r"^model\.path: decoder\.layers\.mlp.* config\.json asks for \(4, 128, 32\)"):
        load_all(mcore, other)
    next(iter((mcore / "release").glob("__0_0.distcp"))).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^model\.path: .*__0_0\.distcp"):
        load_all(mcore, mcore)
    (mcore / "release" / ".metadata").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"^model\.path: .*\.metadata is damaged"):
        open_weights(mcore, architecture)
    (mcore / "latest_checkpointed_iteration.txt").write_text("7")
    with pytest.raises(ValueError, match=r"^model\.path: .* names '7'"):
        load_decoder(mcore, torch.device("cpu"), torch.float32)


def load_all(path: Path, config: Path) -> None:
    architecture = read_architecture(config)
    reader = open_weights(path, architecture)
    for row, place in parameters(architecture, "lm"):
        reader.shard(row, place, architecture.vocab_size, 0, 1)


def change_config(hf: Path, **settings: object) -> None:
    file = hf / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_weights_that_config_json_has_no_place_for_are_refused(tmp_path: Path) -> None:
    """A Qwen2 that says it is a Llama would be trained without its biases."""
    hf = write_checkpoint(tmp_path / "hf", "qwen2")
    check_trunk(hf, read_architecture(hf))
    change_config(hf, model_type="llama", architectures=["LlamaForCausalLM"])
    message = r"^model\.path: model\.layers\.0\.self_attn\.k_proj\.bias of .* has no place in a model of the type llama"
    with pytest.raises(ValueError, match=message):
        check_trunk(hf, read_architecture(hf))
    with pytest.raises(ValueError, match=message):
        load_decoder(hf, torch.device("cpu"), torch.float32)


def test_a_shape_that_config_json_does_not_ask_for_is_refused_without_a_report(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf = write_checkpoint(tmp_path / "hf", "qwen3")
    change_config(hf, head_dim=24)
    with pytest.raises(ValueError, match=r"^model\.path: .*_proj\.weight of .* has the shape .* config\.json asks for"):
        load_decoder(hf, torch.device("cpu"), torch.float32)
    assert capfd.readouterr() == ("", "")


def test_the_head_may_be_another_one(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", "qwen2", head="scalar")
    check_trunk(hf, read_architecture(hf))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, model: str) -> None:
    hf = write_checkpoint(tmp_path / "hf", model)
    tensors = tensors_of(hf)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name].view(-1)[7] = value
    for file in hf.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"^model\.path: {re.escape(name)} of .* not finite .*download or export"):
        load_decoder(hf, torch.device("cpu"), torch.float32)
