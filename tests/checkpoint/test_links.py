"""Where others can write to a run directory, a link among the checkpoints leads to no harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_oreal.checkpoint.train_state import TrainState, remove
from megatron_oreal.config import CheckpointConfig
from megatron_oreal.parallel.layout import ParallelLayout


def layout() -> ParallelLayout:
    alone: dict[str, Any] = {"tensor_group": None, "pipeline_group": None, "data_group": None}
    sizes = {"rank": 0, "world_size": 1, "tensor_rank": 0, "tensor_size": 1, "pipeline_rank": 0, "pipeline_size": 1}
    return ParallelLayout(
        **sizes,
        virtual_size=1,
        data_rank=0,
        data_size=1,
        sequence_parallel=False,
        device=torch.device("cpu"),
        deterministic_updates=False,
        **alone,
    )


@pytest.mark.parametrize("name", [".step_000003.tmp", ".step_000003.old.tmp"])
def test_unfinished_checkpoints_are_removed_and_links_are_not_followed(tmp_path: Path, name: str) -> None:
    mine, folder = tmp_path / "mine", tmp_path / "checkpoints"
    mine.mkdir()
    (mine / "file").write_text("mine")
    (folder / ".step_000002.tmp").mkdir(parents=True)
    (folder / ".step_000002.tmp" / "half").write_text("")
    (folder / name).symlink_to(mine)
    (folder / ".step_000004.tmp").write_text("")
    (folder / ".step_mine.tmp").mkdir()
    (folder / ".step_000005.tmp").symlink_to(tmp_path / "nowhere")
    state = TrainState(folder, {}, layout(), CheckpointConfig())
    assert state.load_latest() is None
    assert [path.name for path in folder.iterdir()] == [".step_mine.tmp"]
    assert (mine / "file").read_text() == "mine"


def test_what_is_gone_can_be_removed(tmp_path: Path) -> None:
    remove(tmp_path / "gone")
