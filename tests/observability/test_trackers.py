"""Trackers: the queue in front of a client, a real MLflow in a folder and on a server, and W&B without its server."""

from __future__ import annotations

import json
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.config import (
    MlflowConfig,
    PrometheusConfig,
    TrackersConfig,
    WandbConfig,
    check_packages,
    monitoring,
)
from megatron_oreal.observability.mlflow_client import MlflowTracker, valid_name
from megatron_oreal.observability.trackers import Outcome, Tracker
from megatron_oreal.observability.wandb_client import WandbTracker
from megatron_oreal.parallel.stopping import RunStopped
from megatron_oreal.types import Metrics
from tests.support.paths import ROOT

MLFLOW_SERVER = ROOT / ".venv-mlflow" / "bin" / "mlflow"


def record(step: int, **values: float) -> Metrics:
    return {"step": step, "time/step_seconds": 1.5, "eval/gsm8k/pass@1": step / 8} | values


class Memory:
    """A client that keeps what it gets, and fails where the test says so."""

    name = "Memory"

    def __init__(self, last_step: int = -1) -> None:
        self.last_step = last_step
        self.steps: list[float] = []
        self.files: list[str] = []
        self.outcome: Outcome | None = None
        self.is_down = False
        self.gate = threading.Event()  # a call waits for it
        self.gate.set()
        self.called = threading.Semaphore(0)

    def open(self) -> int:
        return self.last_step

    def log(self, records: Sequence[Metrics]) -> None:
        self.called.release()
        self.gate.wait(60)
        if self.is_down:
            raise ConnectionError("nobody listens\nat port 5000")
        self.steps += [one["step"] for one in records]

    def upload(self, file: Path) -> None:
        self.files.append(file.read_text())

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome


def test_records_and_files_arrive_in_order(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 1")
    client, notes = Memory(), list[str]()
    with Tracker(client, notes.append) as tracker:
        tracker.upload(tmp_path / "config.yaml")
        for step in range(25):
            tracker.log(record(step))
    assert client.steps == list(range(25))
    assert client.files == ["seed: 1"] and client.outcome == "finished" and not notes


def test_a_resumed_run_sends_what_the_tracker_lacks_and_nothing_twice() -> None:
    client = Memory(last_step=3)
    with Tracker(client, print, [record(step) for step in range(6)]) as tracker:
        tracker.log(record(6))
    assert client.steps == [4, 5, 6]
    client = Memory(last_step=7)  # The run was killed after step 7, and its newest checkpoint is of step 5.
    with Tracker(client, print, [record(step) for step in range(5)]) as tracker:
        for step in range(5, 10):
            tracker.log(record(step))
    assert client.steps == [8, 9]


def test_a_slow_tracker_holds_nobody_up_and_the_oldest_records_are_dropped() -> None:
    client, notes = Memory(), list[str]()
    client.gate.clear()
    tracker = Tracker(client, notes.append, capacity=5, close_seconds=60)
    tracker.log(record(0))
    assert client.called.acquire(timeout=60)  # It is inside of the first call, and stays there.
    for step in range(1, 21):
        tracker.log(record(step))
    assert len(tracker.records) == 5 and tracker.num_dropped == 15
    client.gate.set()
    tracker.close()
    assert client.steps == [0, 16, 17, 18, 19, 20]
    assert notes == [
        "Memory has not got everything (15 records, 0 files): metrics.jsonl in the run directory has all records"
    ]


def test_a_failing_tracker_costs_one_line_and_gets_everything_later() -> None:
    client, notes = Memory(), list[str]()
    client.is_down = True
    tracker = Tracker(client, notes.append, retry_seconds=0.01)
    for step in range(3):
        tracker.log(record(step))
    for _ in range(3):
        assert client.called.acquire(timeout=60)
    client.is_down = False
    tracker.close()
    assert client.steps == [0, 1, 2] and client.outcome == "finished"
    assert len(notes) == 1 and "ConnectionError: nobody listens at port 5000" in notes[0]


def test_a_tracker_that_stays_away_is_given_up() -> None:
    client, notes = Memory(), list[str]()
    client.is_down = True
    with Tracker(client, notes.append, retry_seconds=60) as tracker:
        tracker.log(record(0))
        assert client.called.acquire(timeout=60)
    assert len(notes) == 2 and "(1 records, 0 files)" in notes[1]


@pytest.mark.parametrize(
    ("error", "outcome"), [(ValueError("x"), "failed"), (RunStopped(), "stopped"), (KeyboardInterrupt(), "stopped")]
)
def test_how_the_run_ended(error: BaseException, outcome: Outcome) -> None:
    client = Memory()
    with pytest.raises(type(error)), Tracker(client, print):
        raise error
    assert client.outcome == outcome


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check_packages(TrackersConfig(), PrometheusConfig())
    monkeypatch.setattr(monitoring, "is_installed", lambda package: False)
    check_packages(TrackersConfig(), PrometheusConfig())
    with pytest.raises(ValueError, match=r"trackers\.mlflow\.enabled=true needs .* mlflow, .*megatron_oreal\[mlflow\]"):
        check_packages(TrackersConfig(mlflow=MlflowConfig(enabled=True)), PrometheusConfig())
    with pytest.raises(ValueError, match=r"prometheus\.port needs .*\[prometheus\]"):
        check_packages(TrackersConfig(), PrometheusConfig(port=9000))


def test_a_folder_of_a_packages_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_a_package_here").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not monitoring.is_installed("not_a_package_here")
    assert not monitoring.is_installed("nor_this_one") and monitoring.is_installed("json")


def test_names_that_mlflow_takes() -> None:
    assert valid_name("eval/gsm8k/pass@1") == "eval/gsm8k/pass_at_1"
    assert valid_name("judge/big+math/overruled") == "judge/big_math/overruled"


def mlflow_run(run_dir: Path, uri: str) -> tuple[Any, Any]:
    """The client, and the run whose id the run directory has."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=(run_dir / "mlflow").as_uri())
    return client, client.get_run(json.loads((run_dir / "trackers" / "mlflow.json").read_text())["run_id"])


PATIENT = 250.0  # seconds: nothing here may depend on the load of the machine


def log_two_starts(client: Callable[[], Any], run_dir: Path, notes: list[str]) -> None:
    """A run that is killed after step 4 and goes on from step 3, and then fails."""
    (run_dir / "config.yaml").write_text("seed: 1\n")
    (run_dir / "report.html").write_text("<p>")
    with Tracker(client(), notes.append, close_seconds=PATIENT) as tracker:
        tracker.upload(run_dir / "config.yaml")
        for step in range(5):
            tracker.log(record(step, loss=float("nan") if step == 1 else 0.5))
    past = [record(step) for step in range(3)]
    with pytest.raises(ValueError), Tracker(client(), notes.append, past, close_seconds=PATIENT) as tracker:
        tracker.upload(run_dir / "report.html")
        for step in range(3, 7):
            tracker.log(record(step, loss=float("inf")))
        raise ValueError


def check_mlflow(run_dir: Path, uri: str | None, shown: str) -> None:
    notes: list[str] = []
    settings = {"seed": 1, "eval.prompts.a": "x" * 9000} | {f"many.{number}": number for number in range(150)}
    config = MlflowConfig(enabled=True, tracking_uri=uri, experiment="sums", run_name="first")
    log_two_starts(lambda: MlflowTracker(config, run_dir, settings), run_dir, notes)
    assert not notes
    client, run = mlflow_run(run_dir, shown)
    assert run.info.status == "FAILED" and run.info.run_name == "first"
    assert run.data.params["seed"] == "1" and len(run.data.params) == 152
    for name in ("time/step_seconds", "eval/gsm8k/pass_at_1"):
        assert [metric.step for metric in client.get_metric_history(run.info.run_id, name)] == list(range(7))
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.yaml", "report.html"}
    assert len(client.search_runs([run.info.experiment_id])) == 1


def test_mlflow_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    check_mlflow(tmp_path, None, (tmp_path / "mlflow").as_uri())


@pytest.fixture
def mlflow_server(tmp_path: Path) -> Iterator[str]:
    if not MLFLOW_SERVER.exists():
        pytest.skip("no MLflow server: python -m venv .venv-mlflow && .venv-mlflow/bin/pip install mlflow")
    port = "5931"
    (tmp_path / "server").mkdir()
    with (tmp_path / "server" / "log").open("w") as log:
        process = subprocess.Popen(
            [MLFLOW_SERVER, "server", "--port", port, "--workers", "1", "--backend-store-uri", "sqlite:///runs.db"],
            cwd=tmp_path / "server",
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_mlflow_on_a_server(tmp_path: Path, mlflow_server: str) -> None:
    pytest.importorskip("mlflow")
    import requests

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            if requests.get(f"{mlflow_server}/health", timeout=5).ok:
                break
        except requests.ConnectionError:
            time.sleep(1)
    check_mlflow(tmp_path, mlflow_server, mlflow_server)


def test_an_mlflow_server_that_is_down(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    notes: list[str] = []
    config = MlflowConfig(enabled=True, tracking_uri="http://127.0.0.1:9")
    with Tracker(MlflowTracker(config, tmp_path, {}), notes.append, failed_close_seconds=60) as tracker:
        for step in range(3):
            tracker.log(record(step))
    assert len(notes) == 2 and notes[0].startswith("MLflow does not take the run's records (")
    assert "(3 records, 0 files)" in notes[1]


def test_wandb_without_its_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr("megatron_oreal.observability.wandb_client.INIT_SECONDS", PATIENT)
    assert hasattr(wandb, "init")
    notes: list[str] = []
    config = WandbConfig(enabled=True, mode="offline", project="sums")
    log_two_starts(lambda: WandbTracker(config, tmp_path, {"seed": 1}), tmp_path, notes)
    assert not notes
    state = json.loads((tmp_path / "trackers" / "wandb.json").read_text())
    assert state["last_step"] == 6
    steps = [step for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")) for step in logged_steps(file)]
    assert steps == list(range(7))
    names = {file.name for file in tmp_path.glob(f"wandb/offline-run-*-{state['run_id']}/files/*")}
    assert {"config.yaml", "report.html"} <= names


def logged_steps(file: Path) -> list[int]:
    """The steps of the records in an offline run's file, which is a log of LevelDB's format after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, steps, parts = file.read_bytes(), 7, [], b""
    while position + 7 <= len(content):
        left_of_block = 32768 - position % 32768
        if left_of_block < 7:
            position += left_of_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found = wandb_internal_pb2.Record.FromString(parts)
            parts = b""
            if found.WhichOneof("record_type") == "history":
                steps.append(found.history.step.num)
    return steps
