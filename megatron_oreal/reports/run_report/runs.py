"""Reads everything that the report shows about a run, whether finished, killed or unfinished."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_oreal.config import WITHOUT_INFLUENCE, flatten
from megatron_oreal.observability import environment
from megatron_oreal.observability.alarm_log import read_alarms
from megatron_oreal.observability.alarms import AlarmEvent
from megatron_oreal.observability.metrics import Metrics, metrics_path, read_metrics
from megatron_oreal.reports.run_report.charts import Curve
from megatron_oreal.reports.run_report.rollouts import RolloutSummary, summarize_rollouts

STEP_FOLDER = re.compile(r"step_(\d{6,})")
# Runs of one experiment may differ in settings whose names begin with one of these.
NOT_OF_THE_EXPERIMENT = ("seed", *WITHOUT_INFLUENCE)


@dataclass(slots=True)
class SavedCheckpoint:
    step: int
    path: Path
    evaluation: dict[str, float]


@dataclass(slots=True)
class ReportedRun:
    name: str
    path: Path
    settings: dict[str, object]  # {"rollout.group_size": 8, ...}
    records: list[Metrics]
    starts: list[dict[str, Any]]  # the lines of environment.jsonl
    checkpoints: list[SavedCheckpoint]
    rollouts: RolloutSummary
    alarms: list[AlarmEvent] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def curve(self, metric: str) -> Curve:
        """Returns the finite values of a metric by step."""
        return {
            record["step"]: record[metric]
            for record in self.records
            if metric in record and math.isfinite(record[metric])
        }

    @property
    def metric_names(self) -> set[str]:
        return {name for record in self.records for name in record} - {"step"}

    @property
    def last_step(self) -> int:
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def experiment(self) -> str:
        """Returns a key; runs with the same key differ only in their seeds."""
        kept = {name: value for name, value in self.settings.items() if not name.startswith(NOT_OF_THE_EXPERIMENT)}
        return json.dumps(kept, sort_keys=True, default=str)


def read_reported_run(path: Path, name: str) -> ReportedRun:
    """Reads a run. Raises a one-line ValueError for a path without a training run or a run without a finished step."""
    if not path.is_dir():
        raise ValueError(
            f"{path} {'is a file' if path.exists() else 'does not exist'}: give the run_dir of a training run"
        )
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{path} is not a run's: it has no config.yaml; give the run_dir of `megatron-oreal train` or `sft`"
        )
    if not metrics_path(path).is_file():
        raise ValueError(
            f"{path} has no metrics.jsonl: `train` and `sft` write it, `eval` does not; give another run_dir"
        )
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} has not finished a step yet: make the report again later")
    notes: list[str] = []
    return ReportedRun(
        name=name,
        path=path,
        settings=read_settings(path, notes),
        records=records,
        starts=read_json_lines(path / environment.FILE),
        checkpoints=read_checkpoints(path),
        rollouts=summarize_rollouts(path, notes),
        alarms=read_alarms(path),
        notes=notes,
    )


def read_settings(path: Path, notes: list[str]) -> dict[str, object]:
    try:
        settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError):
        settings = None
    if not isinstance(settings, dict):
        notes.append("config.yaml cannot be read: settings are missing")
        return {}
    return flatten(settings)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole objects of a file; skips incomplete and damaged lines."""
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            found.append(entry)
    return found


def read_checkpoints(path: Path) -> list[SavedCheckpoint]:
    folder = path / "checkpoints"
    found = []
    for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = STEP_FOLDER.fullmatch(entry.name)
        if match is None:
            continue
        try:
            evaluation = json.loads((entry / "run.json").read_text())["progress"]["evaluation"]
            scores = {str(name): float(value) for name, value in evaluation.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            scores = {}  # An unfinished run may have just removed it.
        found.append(SavedCheckpoint(int(match[1]), entry, scores))
    return found


def run_names(paths: Sequence[Path]) -> list[str]:
    """Returns short distinct names of the runs: the folder's name, with its parents if two are the same."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise ValueError("a run is given twice: give each run once")
    for depth in range(1, 1 + max(len(path.parts) for path in resolved)):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]
