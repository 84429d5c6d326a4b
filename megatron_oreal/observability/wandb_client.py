"""Logs a run to Weights & Biases: to its server, or to RUN_DIR/wandb for `wandb sync`.

RUN_DIR/trackers/wandb.json holds the run's id and the last logged step, so that a resumed run continues it. An offline
run has one folder for each start, and `wandb sync RUN_DIR/wandb/offline-run-*` merges them into one run.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_oreal.config.monitoring import WandbConfig
from megatron_oreal.observability.mlflow_client import read_state, write_state
from megatron_oreal.observability.trackers import Outcome
from megatron_oreal.types import Metrics

INIT_SECONDS = 60  # for the server to answer


class WandbTracker:
    """A `TrackerClient`. `settings`: the run's flattened configuration, which becomes W&B's configuration."""

    name = "W&B"

    def __init__(self, config: WandbConfig, run_dir: Path, settings: Mapping[str, object]) -> None:
        self.config, self.run_dir, self.settings = config, run_dir, settings
        self.state_file = run_dir / "trackers" / "wandb.json"
        self.run: Any = None
        self.run_id = ""

    def open(self) -> int:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        config, state = self.config, read_state(self.state_file)
        is_known = "run_id" in state and (state["project"], state["entity"]) == (config.project, config.entity)
        self.run_id = state["run_id"] if is_known else secrets.token_hex(4)
        self.run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            group=config.group,
            name=config.run_name or self.run_dir.resolve().name,
            id=self.run_id,
            resume="allow",
            dir=str(self.run_dir),
            config=dict(self.settings),
            # W&B must not capture the training's output, code and git state; it receives only what is logged here.
            settings=wandb.Settings(
                console="off", silent=True, save_code=False, disable_git=True, init_timeout=INIT_SECONDS
            ),
        )
        last_step = int(state.get("last_step", -1)) if is_known else -1
        last_step = max(last_step, int(self.run.step) - 1)
        self._keep(last_step)
        return last_step

    def log(self, records: Sequence[Metrics]) -> None:
        for record in records:
            numbers = {name: value for name, value in record.items() if name != "step"}
            self.run.log(numbers, step=int(record["step"]), commit=True)
        self._keep(int(records[-1]["step"]))

    def upload(self, file: Path) -> None:
        # For a file in another folder W&B would make a link and print a warning.
        copied = shutil.copy(file, self.run.dir)
        self.run.save(copied, base_path=self.run.dir, policy="now")

    def close(self, outcome: Outcome) -> None:
        self.run.finish(exit_code=int(outcome == "failed"))

    def _keep(self, last_step: int) -> None:
        state = {"project": self.config.project, "entity": self.config.entity}
        write_state(self.state_file, {**state, "run_id": self.run_id, "last_step": last_step})
