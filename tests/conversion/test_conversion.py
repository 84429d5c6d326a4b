"""tools/convert.py: the way there and back, and what it refuses."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oreal.commands import convert
from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from megatron_oreal.weights.hf_directory import HfReader
from tests.support.paths import ROOT
from tests.support.tiny_checkpoints import MODELS, write_checkpoint


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    reader = HfReader(path)
    return {name: reader.read(name, None, 0, 1) for name in reader.file_of}


def assert_same_tensors(path: Path, expected: Path) -> None:
    found, wanted = tensors_of(path), tensors_of(expected)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The tool's exit code."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    try:
        convert.main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_round_trip_gives_the_same_bits(tmp_path: Path, model: str, dtype: torch.dtype) -> None:
    hf = write_checkpoint(tmp_path / "hf", model, dtype)
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions())
    report = conversion.megatron_to_hf(tmp_path / "mcore", tmp_path / "back", ConversionOptions())
    assert_same_tensors(tmp_path / "back", hf)
    assert report.num_tensors == len(tensors_of(hf))
    for name in ("config.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((hf / name).read_text())


def test_several_processes_and_files_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "SMALLEST_ITEM", 4096)
    monkeypatch.setattr(conversion, "SHARD_BYTES", 20_000)
    hf = write_checkpoint(tmp_path / "hf", "qwen3_moe", num_files=3)
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions(num_workers=2))
    assert len(list((tmp_path / "mcore" / "release").glob("*.distcp"))) > 3
    conversion.megatron_to_hf(tmp_path / "mcore", tmp_path / "back", ConversionOptions(num_workers=2))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    assert_same_tensors(tmp_path / "back", hf)


def test_not_a_number_and_minus_zero_survive(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", "llama", num_files=1)
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][:2] = torch.tensor([float("nan"), -0.0])
    save_file(tensors, hf / "model.safetensors")
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions())
    conversion.megatron_to_hf(tmp_path / "mcore", tmp_path / "back", ConversionOptions())
    back = load_file(tmp_path / "back" / "model.safetensors")["model.norm.weight"]
    assert torch.equal(back.view(torch.int32), tensors["model.norm.weight"].view(torch.int32))


def test_another_dtype_on_request(tmp_path: Path) -> None:
    hf = write_checkpoint(tmp_path / "hf", "qwen2")
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions(dtype=torch.bfloat16))
    conversion.megatron_to_hf(tmp_path / "mcore", tmp_path / "back", ConversionOptions(dtype=torch.float32))
    found = tensors_of(tmp_path / "back")
    for name, tensor in tensors_of(hf).items():
        assert torch.equal(found[name], tensor.bfloat16().float())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_a_dtype_of_the_same_size(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Neither holds the other's values: the casts of both ways are verified, and compared afterwards."""
    hf = write_checkpoint(tmp_path / "hf", "qwen2", dtype=stored)
    tensors = {name: 0.02 * torch.randn_like(tensor) for name, tensor in tensors_of(hf).items()}
    for file in hf.glob("*.safetensors"):
        save_file({name: tensors[name] for name in load_file(file)}, file)
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions(dtype=wanted))
    conversion.verify(hf, tmp_path / "mcore", 1)
    conversion.megatron_to_hf(tmp_path / "mcore", tmp_path / "back", ConversionOptions(dtype=stored))
    for name, tensor in tensors_of(tmp_path / "back").items():
        assert torch.equal(tensor, tensors[name].to(wanted).to(stored))


def test_a_scalar_head_is_declared_and_kept(tmp_path: Path) -> None:
    names = ["Qwen2ForSequenceClassification"]
    hf = write_checkpoint(tmp_path / "hf", "qwen2", head="scalar", architectures=names, num_labels=1)
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions())
    conversion.megatron_to_hf(tmp_path / "mcore", tmp_path / "back", ConversionOptions())
    assert_same_tensors(tmp_path / "back", hf)
    from transformers import AutoModelForSequenceClassification

    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "back")
    assert torch.equal(loaded.score.weight, tensors_of(hf)["score.weight"])


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2), (2, 1), (1, 4)])
@pytest.mark.parametrize(("model", "role"), [("qwen2", "policy"), ("qwen2-tied", "policy"), ("qwen2", "reward_model")])
def test_the_trainers_own_checkpoints_are_read(
    tmp_path: Path, tensor: int, pipeline: int, model: str, role: str
) -> None:
    head: Any = "lm" if role == "policy" else "scalar"
    hf = write_checkpoint(tmp_path / "hf", model, head=head)
    folder = write_trainer_model(tmp_path / "run", hf, head, role, tensor, pipeline)
    (tmp_path / "run" / "config.yaml").write_text(f"model: {{path: {hf}}}\n")
    conversion.megatron_to_hf(folder, tmp_path / "out", ConversionOptions())
    assert_same_tensors(tmp_path / "out", hf)


def write_trainer_model(run: Path, hf: Path, head: Any, role: str, tensor: int, pipeline: int) -> Path:
    """As train_state.py does from live models: each stage has its layers, the last one the head."""
    from megatron_oreal.weights.families import parameters, read_architecture
    from megatron_oreal.weights.mapping import pad_rows, padded_vocabulary, slice_along

    folder = run / "checkpoints" / "step_000007" / role
    folder.mkdir(parents=True)
    (folder.parent / "run.json").write_text(json.dumps({"layout": {"tensor": tensor, "pipeline": pipeline}}))
    architecture, tensors = read_architecture(hf), tensors_of(hf)
    vocabulary = padded_vocabulary(architecture.vocab_size, tensor)
    layers_per_stage = architecture.num_layers // pipeline
    for rank in range(tensor):
        stages: list[dict[str, torch.Tensor]] = [{} for _ in range(pipeline)]
        for row, place in parameters(architecture, head):
            first = 0 if row.megatron.startswith("embedding") else pipeline - 1
            stage = first if place.layer is None else place.layer // layers_per_stage
            if row.megatron.startswith("output") and not row.exported and pipeline == 1:
                continue  # shared with the embedding
            whole = [tensors[name] for name in row.hf_names(place)]
            whole = [pad_rows(part, vocabulary) if row.pads_vocabulary else part for part in whole]
            pieces = [slice_along(part, row.op.axis, rank, tensor) for part in whole]
            stages[stage][row.megatron_name(place)] = row.op.merge(pieces).clone()
        for number, content in enumerate(stages):
            save_file(content, folder / f"parameters_t{rank:02d}_p{number:02d}.safetensors")
    return folder


def rewrite(hf: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors")


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def change_config(hf: Path, **changes: Any) -> None:
    settings = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(settings | changes))


BAD_HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda hf: rewrite(hf, lambda t: t.pop("model.norm.weight")), "no tensor model.norm.weight"),
    "extra": (lambda hf: rewrite(hf, lambda t: t.update(foo=torch.zeros(1))), "foo"),
    "shape": (lambda hf: rewrite(hf, lambda t: t.update({"model.norm.weight": torch.zeros(3)})), "model.norm.weight"),
    "dtype": (
        lambda hf: rewrite(hf, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)})),
        "model.norm.weight",
    ),
    "mixed": (
        lambda hf: rewrite(
            hf, lambda t: t.update({"model.layers.1.input_layernorm.weight": torch.zeros(32, dtype=torch.float16)})
        ),
        "--dtype",
    ),
    "truncated": (lambda hf: truncate(hf / "model.safetensors"), "model.safetensors"),
    "unknown": (lambda hf: change_config(hf, model_type="gpt2"), "known: qwen2, qwen3"),
    "pickle": (
        lambda hf: ((hf / "pytorch_model.bin").write_bytes(b"x"), (hf / "model.safetensors").unlink()),
        "only safetensors",
    ),
    "no config": (lambda hf: (hf / "config.json").unlink(), "config.json"),
    "index": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}})
        ),
        "is not in the index",
    ),
    "outside": (
        lambda hf: (hf / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}})
        ),
        "outside of it",
    ),
}


@pytest.mark.parametrize("case", BAD_HF)
def test_bad_input_ends_with_one_line_and_nothing_left(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_HF[case]
    hf = write_checkpoint(tmp_path / "hf", "llama-plain", num_files=1)
    damage(hf)
    assert run("hf2mcore", "--hf", hf, "--out", tmp_path / "out", monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Error: ") and errors.count("\n") == 1 and message in errors
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


class Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploited",)


def damage_metadata(mcore: Path) -> None:
    (mcore / "release" / ".metadata").write_bytes(pickle.dumps(Exploit()))


BAD_MCORE: dict[str, tuple[Callable[[Path], object], str]] = {
    "hostile": (damage_metadata, "refused"),
    "garbage": (lambda mcore: (mcore / "release" / ".metadata").write_bytes(b"garbage"), "damaged"),
    "cut": (lambda mcore: truncate(mcore / "release" / ".metadata"), "damaged"),
    "chunk": (lambda mcore: truncate(mcore / "release" / "__0_0.distcp"), "damaged where"),
    "gone": (lambda mcore: (mcore / "release" / "__0_0.distcp").unlink(), "cannot be read"),
    "tracker": (lambda mcore: (mcore / "latest_checkpointed_iteration.txt").write_text("../x"), "no torch_dist"),
    "other model": (lambda mcore: change_config(mcore, num_hidden_layers=5), "config.json asks for"),
    "no config": (lambda mcore: (mcore / "config.json").unlink(), "--hf"),
}


@pytest.mark.parametrize("case", BAD_MCORE)
def test_a_bad_checkpoint_ends_with_one_line_and_nothing_left(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, message = BAD_MCORE[case]
    conversion.hf_to_megatron(write_checkpoint(tmp_path / "hf", "llama-plain"), tmp_path / "mcore", ConversionOptions())
    damage(tmp_path / "mcore")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    arguments = ("mcore2hf", "--mcore", tmp_path / "mcore", "--out", tmp_path / "out", "--workers", 2)
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("Error: ") and message in errors[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "mcore"}


def test_verify_names_the_tensor_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mcore = write_checkpoint(tmp_path / "hf", "qwen3", num_files=1), tmp_path / "mcore"
    conversion.hf_to_megatron(hf, mcore, ConversionOptions())
    assert run("verify", "--hf", hf, "--mcore", mcore, monkeypatch=monkeypatch) == 0
    rewrite(hf, lambda tensors: tensors["model.layers.2.self_attn.k_norm.weight"].add_(1e-3))
    conversion.open_hf.cache_clear()
    assert run("verify", "--hf", hf, "--mcore", mcore, monkeypatch=monkeypatch) == 2
    assert "model.layers.2.self_attn.k_norm.weight" in capsys.readouterr().err


def test_inspect_and_existing_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, mcore = write_checkpoint(tmp_path / "hf", "internlm2"), tmp_path / "mcore"
    conversion.hf_to_megatron(hf, mcore, ConversionOptions())
    capsys.readouterr()
    for path, kind in ((hf, "Hugging Face"), (mcore, "Megatron")):
        assert run("inspect", path, monkeypatch=monkeypatch) == 0
        assert f"{kind}, internlm2, lm head" in capsys.readouterr().out
    assert run("hf2mcore", "--hf", hf, "--out", mcore, monkeypatch=monkeypatch) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_output_and_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}
    hf, out = write_checkpoint(tmp_path / "hf", "llama-plain", **size), tmp_path / "out"
    command = [sys.executable, "tools/convert.py", "hf2mcore", "--hf", str(hf), "--out", str(out), "--workers", "2"]
    for killer in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob(".out.*.tmp/release/*.distcp")):
            time.sleep(0.001)
        process.send_signal(killer)
        assert process.wait(60) != 0 and not out.exists()
        assert bool(list(tmp_path.glob(".out.*.tmp"))) == (killer is signal.SIGKILL)
        conversion.hf_to_megatron(hf, out, ConversionOptions())
        assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
        conversion.megatron_to_hf(out, tmp_path / "back", ConversionOptions())
        assert_same_tensors(tmp_path / "back", hf)
        for path in (out, tmp_path / "back"):
            subprocess.run(["rm", "-r", path], check=True)
