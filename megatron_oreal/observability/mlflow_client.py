"""Logs a run to MLflow: a server, a database or a folder. All but databases need only the package `mlflow-skinny`.

RUN_DIR/trackers/mlflow.json holds the run's id, so that a resumed run continues it. MLflow itself knows the logged
steps. MLflow's names have no "@", so `eval/gsm8k/pass@1` becomes `eval/gsm8k/pass_at_1`.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_oreal.config.monitoring import MlflowConfig
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.trackers import Outcome
from megatron_oreal.types import Metrics

MARKER = "time/step_seconds"  # each record has this metric, whose history shows the steps that MLflow has
MAX_PARAMS = 100  # in one call
MAX_PARAM_CHARACTERS = 6000
MAX_METRICS = 1000  # in one call
STATUSES: dict[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowTracker:
    """A `TrackerClient`. `settings`: the run's flattened configuration, which becomes MLflow's parameters."""

    name = "MLflow"

    def __init__(self, config: MlflowConfig, run_dir: Path, settings: Mapping[str, object]) -> None:
        self.config, self.run_dir, self.settings = config, run_dir, settings
        self.uri = config.tracking_uri or (run_dir / "mlflow").resolve().as_uri()
        self.state_file = run_dir / "trackers" / "mlflow.json"
        self.client: Any = None
        self.run_id = ""

    def open(self) -> int:
        # The thread that calls MLflow repeats failed calls itself; MLflow's own retries would take minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        # MLflow 3 requires this opt-in to write to a folder, the only store without a server or a database.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        # The registry of models is unused, and not every address of a tracking server can be a registry's.
        self.client = MlflowClient(tracking_uri=self.uri, registry_uri=(self.run_dir / "mlflow").resolve().as_uri())
        state = read_state(self.state_file)
        if state.get("tracking_uri") == self.uri:
            self.run_id = state["run_id"]
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self._create()
            write_state(self.state_file, {"tracking_uri": self.uri, "run_id": self.run_id})
        run = self.client.get_run(self.run_id)
        if not run.data.params:
            params = [
                Param(valid_name(name), str(value)[:MAX_PARAM_CHARACTERS]) for name, value in self.settings.items()
            ]
            for begin in range(0, len(params), MAX_PARAMS):
                self.client.log_batch(self.run_id, params=params[begin : begin + MAX_PARAMS])
        if MARKER not in run.data.metrics:
            return -1
        return max(metric.step for metric in self.client.get_metric_history(self.run_id, MARKER))

    def _create(self) -> str:
        name = self.config.experiment
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment is not None else self.client.create_experiment(name)
        run_name = self.config.run_name or self.run_dir.resolve().name
        created: str = self.client.create_run(experiment_id, run_name=run_name).info.run_id
        return created

    def log(self, records: Sequence[Metrics]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(valid_name(name), float(value), now, int(record["step"]))
            for record in records
            for name, value in record.items()
            if name != "step"
        ]
        for begin in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[begin : begin + MAX_METRICS])

    def upload(self, file: Path) -> None:
        self.client.log_artifact(self.run_id, str(file))

    def close(self, outcome: Outcome) -> None:
        self.client.set_terminated(self.run_id, STATUSES[outcome])


def valid_name(name: str) -> str:
    """Replaces characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-./: ]", "_", name.replace("@", "_at_"))


def read_state(file: Path) -> dict[str, Any]:
    """Reads the state that a tracker has written to the run directory; {} if there is none."""
    try:
        state = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def write_state(file: Path, state: Mapping[str, object]) -> None:
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(state))
