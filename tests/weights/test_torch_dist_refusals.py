"""What a torch_dist directory of somebody else could do: code in .metadata, files outside of it, misshapen tensors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_oreal.conversion import conversion
from megatron_oreal.conversion.conversion import ConversionOptions
from megatron_oreal.weights.families import parameters, read_architecture
from megatron_oreal.weights.torch_dist_reader import TorchDistReader, iteration_directory, noted_head, read_common
from tests.support.tiny_checkpoints import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """(a Hugging Face directory, the directory with .metadata of its conversion)."""
    hf = write_checkpoint(tmp_path / "hf", "qwen2")
    conversion.hf_to_megatron(hf, tmp_path / "mcore", ConversionOptions())
    return hf, iteration_directory(tmp_path / "mcore")


def rewrite(directory: Path, change: Callable[[Any], None]) -> None:
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    change(metadata)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def read_all(hf: Path, directory: Path) -> int:
    architecture = read_architecture(hf)
    reader = TorchDistReader(directory, architecture)
    rows = list(parameters(architecture, "lm"))
    reader.check(rows)
    return sum(len(reader.hf_tensors(row, place)) for row, place in rows)


class Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_metadata_is_refused_and_does_not_run(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    hf, directory = checkpoint
    assert read_all(hf, directory) > 10
    (directory / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "made by code")))
    with pytest.raises(ValueError, match=r"\.metadata holds a posix\.mkdir, which no checkpoint needs: it is refused"):
        read_all(hf, directory)
    assert not (tmp_path / "made by code").exists()
    for content in (b"", b"\x80", b"text"):
        (directory / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"^--mcore: .*\.metadata is damaged; convert or save again$"):
            read_all(hf, directory)


def test_code_in_common_is_not_run(checkpoint: tuple[Path, Path], tmp_path: Path) -> None:
    _, directory = checkpoint
    assert noted_head(directory) == "lm" and read_common(directory)
    torch.save({"args": Code(tmp_path / "made by code")}, directory / "common.pt")
    assert read_common(directory) == {} and noted_head(directory) == "lm"
    assert not (tmp_path / "made by code").exists()


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "inner/file.distcp", ".."])
def test_files_outside_of_the_checkpoint_are_refused(checkpoint: tuple[Path, Path], name: str) -> None:
    hf, directory = checkpoint
    for file in directory.glob("*.distcp"):
        (directory.parent / "outside.distcp").write_bytes(file.read_bytes())

    def move(metadata: Any) -> None:
        metadata.storage_data = {
            index: replace(stored, relative_path=name) for index, stored in metadata.storage_data.items()
        }

    rewrite(directory, move)
    with pytest.raises(ValueError, match=r"names the file .*, outside of the checkpoint: it is refused|cannot be read"):
        read_all(hf, directory)


def test_parts_that_are_missing_or_misplaced_are_named(checkpoint: tuple[Path, Path]) -> None:
    hf, directory = checkpoint
    key = "decoder.final_layernorm.weight"
    original = (directory / ".metadata").read_bytes()

    def changed(change: Callable[[Any], None], message: str) -> None:
        (directory / ".metadata").write_bytes(original)
        rewrite(directory, change)
        with pytest.raises(ValueError, match=message):
            read_all(hf, directory)

    def without_storage(metadata: Any) -> None:
        metadata.storage_data = {index: stored for index, stored in metadata.storage_data.items() if index.fqn != key}

    def shifted(metadata: Any) -> None:
        for index, stored in metadata.storage_data.items():
            if index.fqn == key:
                metadata.storage_data[index] = replace(stored, offset=stored.offset + 7)

    def longer(metadata: Any) -> None:
        described = metadata.state_dict_metadata[key]
        metadata.state_dict_metadata[key] = replace(described, size=torch.Size([33]))

    changed(lambda metadata: metadata.state_dict_metadata.pop(key), f"has no tensor {key}")
    changed(without_storage, rf"\.metadata does not say where {key} is")
    changed(shifted, rf"is damaged where {key} should be")
    changed(longer, rf"{key} has the shape \(33,\), config.json asks for \(32,\)")
    changed(
        lambda metadata: metadata.state_dict_metadata.update({"decoder.extra": metadata.state_dict_metadata[key]}),
        r"decoder.extra \(1 such\) has no place in the model of config.json",
    )
    assert MetadataIndex(key).fqn == key
