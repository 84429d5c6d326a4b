"""Writes the run's metrics and text samples to RUN_DIR/tensorboard."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path


class TensorBoard:
    """Writes the event files of one process. A run resumed at `start_step` hides the entries from that step on."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        # The import takes a second, and reading metrics does not need it.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)

    def scalars(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            if name != "step":
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        # TensorBoard shows an indented block unchanged; markdown would corrupt the LaTeX of an answer.
        self.writer.add_text(tag, textwrap.indent(text, "    ", lambda line: True), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
