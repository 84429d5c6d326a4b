import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_oreal.observability.files import save_tensors, temporary_directory, write_atomically, writing_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_and_bytes_are_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "π\n")
    assert path.read_bytes() == "π\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["file"]


def test_the_old_content_stays_readable_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with writing_atomically(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), writing_atomically(tmp_path / name) as file:
            file.write(b"half")
            file.flush()
            raise KeyboardInterrupt
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with writing_atomically(path) as first, writing_atomically(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert path.read_bytes() == b"first"  # the outer block ends last
    assert names(tmp_path) == ["file"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    with temporary_directory(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("content")
        assert not out.exists()
    assert (out / "inner" / "file").read_text() == "content"
    assert names(out.parent) == ["folder"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "folder"
    for name in ("first", "second"):
        with temporary_directory(out) as folder:
            (folder / name).write_text(name)
    assert names(out) == ["second"]
    assert names(tmp_path) == ["folder"]


def test_a_folders_block_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(KeyboardInterrupt), temporary_directory(tmp_path / name) as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old" / "file").read_text() == "old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_safetensors_files_follow_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_tensors({"a": torch.ones(2)}, tmp_path / "tensors", {"format": "pt"})
    finally:
        os.umask(before)
    assert (tmp_path / "tensors").stat().st_mode & 0o777 == 0o666 & ~umask
    assert torch.equal(load_file(tmp_path / "tensors")["a"], torch.ones(2))
    assert names(tmp_path) == ["tensors"]
