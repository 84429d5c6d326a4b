"""Runs with trackers and an endpoint: a resumed run goes on in the tracker's run, and no step is there twice."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line


@pytest.mark.slow
def test_trackers_continue_with_the_run(
    train_config: dict[str, Any], command_line: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    from mlflow.tracking import MlflowClient

    run_dir = tmp_path / "run"
    trackers = {"mlflow": {"enabled": True, "experiment": "sums"}, "wandb": {"enabled": True, "mode": "offline"}}
    settings = train_config | {"run_dir": str(run_dir), "trackers": trackers}
    found = []
    for num_steps in (2, 4):
        done = command_line("train", settings | {"num_steps": num_steps}, tmp_path / "config.yaml")
        assert done.returncode == 0, done.stderr
        assert "does not take" not in done.stderr and "not got everything" not in done.stderr
        found.append([json.loads((run_dir / "trackers" / f"{name}.json").read_text()) for name in ("mlflow", "wandb")])
    assert [state["run_id"] for state in found[0]] == [state["run_id"] for state in found[1]]
    assert found[1][1]["last_step"] == 4
    monkeypatch.setenv(
        "MLFLOW_ALLOW_FILE_STORE", "true"
    )  # newer releases of MLflow ask for it before they read a folder
    client = MlflowClient(tracking_uri=(run_dir / "mlflow").as_uri(), registry_uri=(run_dir / "mlflow").as_uri())
    run_id = found[1][0]["run_id"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["data.prompts_per_step"] == "5"
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "report.html"}
    logged = {metric.step: metric.value for metric in client.get_metric_history(run_id, "reward/mean")}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # The first start ended with an evaluation alone as step 2, which the tracker has already when it is trained.
    assert logged == {step: records[step]["reward/mean"] for step in (0, 1, 3)}
    steps = [metric.step for metric in client.get_metric_history(run_id, "time/step_seconds")]
    assert sorted(steps) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_what_watches_a_run_never_stops_it(train_config: dict[str, Any], command_line: Run, tmp_path: Path) -> None:
    """Neither an MLflow server that is not there nor an address that this machine does not have."""
    pytest.importorskip("mlflow")
    pytest.importorskip("prometheus_client")
    settings = train_config | {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 1,
        "trackers": {"mlflow": {"enabled": True, "tracking_uri": "http://127.0.0.1:9"}},
        "prometheus": {"port": 9100, "host": "192.0.2.1"},
    }
    done = command_line("train", settings, tmp_path / "config.yaml")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("MLflow does not take the run's records (") == 1
    assert "prometheus.port: nothing answers at 192.0.2.1:9100" in done.stderr
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
