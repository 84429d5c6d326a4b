"""Records what a test's code makes durable: every fsync with the file's name and the content then on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Disk:
    """The files that a power failure would leave: for each name, the content at its last fsync."""

    synced: list[tuple[str, int]] = field(default_factory=list)  # (name, bytes); for a folder, its number of names
    contents: dict[Path, bytes] = field(default_factory=dict)
    names: dict[Path, set[str]] = field(default_factory=dict)  # by folder, at its last fsync

    def fsync(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.is_dir():
            self.names[path] = {entry.name for entry in path.iterdir()}
            self.synced.append((path.name, len(self.names[path])))
        else:
            self.contents[path] = path.read_bytes()
            self.synced.append((path.name, len(self.contents[path])))


@contextmanager
def recorded_disk(monkeypatch: Any) -> Iterator[Disk]:
    """Replaces os.fsync by a function that records the call and does not wait for the disk."""
    disk = Disk()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        yield disk
