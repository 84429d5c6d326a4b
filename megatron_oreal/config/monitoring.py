"""Defines where a run sends its metrics besides its run directory: to experiment trackers and a Prometheus endpoint."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import Field

from megatron_oreal.config.section import Section


class MlflowConfig(Section):
    """The settings of MLflow, which keeps runs on a server or in a local folder."""

    enabled: bool = False  # The run logs its records to MLflow.
    # Where MLflow keeps its runs: http://HOST:PORT, sqlite:///FILE, or a folder; null: the folder RUN_DIR/mlflow.
    tracking_uri: str | None = None
    # The experiment; the run creates it if it does not exist.
    experiment: str = Field(default="megatron_oreal", min_length=1)
    run_name: str | None = None  # The name that MLflow shows for the run; null uses the name of the run directory.


class WandbConfig(Section):
    """The settings of Weights & Biases, which gets records directly or from a folder that `wandb sync` uploads."""

    enabled: bool = False  # The run logs its records to Weights & Biases.
    # online sends records during the run; offline writes them to RUN_DIR/wandb for `wandb sync`.
    mode: Literal["online", "offline"] = "online"
    # The project; the run creates it if it does not exist.
    project: str = Field(default="megatron_oreal", min_length=1)
    entity: str | None = None  # The user or the team that owns the project; null uses the default of the account.
    group: str | None = None  # The group that this run belongs to, for example the seeds of one experiment.
    run_name: str | None = None  # The name that the page shows for the run; null uses the name of the run directory.


class TrackersConfig(Section):
    """The experiment trackers that get the records of `metrics.jsonl`. TensorBoard always gets them."""

    mlflow: MlflowConfig = MlflowConfig()  # The settings of MLflow.
    wandb: WandbConfig = WandbConfig()  # The settings of Weights & Biases.


class PrometheusConfig(Section):
    """The settings of an HTTP endpoint from which Prometheus reads the state of the trainer."""

    # The port of /metrics; null opens no endpoint. With ranks=all, rank N of a node uses the port plus N.
    port: int | None = Field(default=None, ge=1, le=65535)
    host: str = "127.0.0.1"  # The address that the endpoint listens on; the endpoint has no password and no encryption.
    # The ranks that open an endpoint; only the first rank reports the rollout.
    ranks: Literal["first", "all"] = "first"


def check_packages(trackers: TrackersConfig, prometheus: PrometheusConfig) -> None:
    """Raises ValueError for a tracker or an endpoint whose package is not installed."""
    needed = {
        "trackers.mlflow.enabled=true": ("mlflow", trackers.mlflow.enabled),
        "trackers.wandb.enabled=true": ("wandb", trackers.wandb.enabled),
        "prometheus.port": ("prometheus_client", prometheus.port is not None),
    }
    for setting, (package, is_needed) in needed.items():
        if is_needed and not is_installed(package):
            extra = package.removesuffix("_client")
            raise ValueError(
                f"{setting} needs the Python package {package}, which is not installed: pip install "
                f"'megatron_oreal[{extra}]', or drop the setting"
            )


def is_installed(package: str) -> bool:
    """Says whether the package can be imported. A folder of that name in the working directory does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
