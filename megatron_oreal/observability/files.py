"""Writes files atomically: after a crash, with a full disk or for a concurrent reader, a file is complete or absent."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def writing_atomically(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that gets the name `path` when the block ends, and that is removed if the block raises.

    The folder must exist. An existing file is replaced; until then its old content stays readable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes text (as UTF-8) or bytes; see `writing_atomically`."""
    with writing_atomically(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Makes new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def temporary_directory(out: Path) -> Iterator[Path]:
    """Makes a folder that replaces `out` when the block ends, and that is removed if the block raises."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        publish_directory(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_directory(temporary: Path, out: Path) -> None:
    """Renames a complete folder to `out`; removes an older `out` only after the new files are on disk."""
    for file in temporary.rglob("*"):
        if file.is_file():
            sync_file(file)
        elif file.is_dir():
            sync_folder(file)
    sync_folder(temporary)
    if out.exists():
        old = out.with_name(f".{out.name}.{os.urandom(4).hex()}.old.tmp")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old)
    else:
        temporary.rename(out)
    sync_folder(out.parent)


def sync_file(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the default permissions of new files.

    safetensors 0.8 gives its files mode 0600 regardless of the umask, so colleagues, and servers of another user, could
    not read them.
    """
    from safetensors.torch import save_file  # This module must work without torch.

    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(dict(tensors), file, metadata=metadata)
    file.chmod(mode)
