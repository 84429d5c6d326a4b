"""Old versions of weights are removed, and nothing else that lies beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_oreal.engines.sglang.client import EventLoopThread
from megatron_oreal.engines.sglang.weights.disk import DiskTransport


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[DiskTransport]:
    thread = EventLoopThread("test")
    yield DiskTransport(thread, 60, tmp_path / "weights", tmp_path, is_main=True)
    thread.close()


def test_only_names_of_ours_are_removed(tmp_path: Path, transport: DiskTransport) -> None:
    folder = tmp_path / "weights"
    ours = ["version_000001", "version_1000000", ".version_000002.0a1b2c3d.tmp", ".version_000002.17.0a1b2c3d.old.tmp"]
    users = ["Qwen2.5-7B", "version_1", "version_final", "version_000001.bak", "version_000001 (copy)", ".hidden"]
    users += ["my_version_000001", ".version_000002.tmp", "version_000003"]
    for name in (*ours, *users):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)
    (folder / "version_000004").write_text("a file")
    (folder / "version_000005").symlink_to(tmp_path)
    transport.remove_others(folder / "version_000003")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*users, "version_000004", "version_000005"])
    assert all((folder / name / "model.safetensors").read_text() == name for name in users)
