"""Records what a test's code makes durable: every fsync with the file's name and what the disk then holds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Disk:
    """What would be left of the files after a power cut: for each name, the content at its last fsync."""

    synced: list[tuple[str, int]] = field(default_factory=list)  # (name, bytes), folders with their number of names
    contents: dict[Path, bytes] = field(default_factory=dict)
    names: dict[Path, set[str]] = field(default_factory=dict)  # of each folder that was synced

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
    """os.fsync records instead of waiting for the disk; everything else is as always."""
    disk = Disk()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk.fsync)
        yield disk
