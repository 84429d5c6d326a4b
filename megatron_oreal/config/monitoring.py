"""Where a run's numbers go besides its run directory: experiment trackers and a Prometheus endpoint."""

from __future__ import annotations

import importlib.util
from typing import Literal

from pydantic import Field

from megatron_oreal.config.section import Section


class MlflowConfig(Section):
    """MLflow, on a server or in a folder of its own."""

    enabled: bool = False  # Whether the run is logged to MLflow.
    # Where MLflow keeps its runs: http://HOST:PORT, sqlite:///FILE, or a folder; null: the folder RUN_DIR/mlflow.
    tracking_uri: str | None = None
    experiment: str = Field(default="megatron_oreal", min_length=1)  # The experiment; it is made where there is none.
    run_name: str | None = None  # The name that MLflow shows for the run; null: the name of the run directory.


class WandbConfig(Section):
    """Weights & Biases, on its server or in a folder that `wandb sync` uploads later."""

    enabled: bool = False  # Whether the run is logged to Weights & Biases.
    # online sends records while the run goes on; offline writes them to RUN_DIR/wandb for `wandb sync`.
    mode: Literal["online", "offline"] = "online"
    project: str = Field(default="megatron_oreal", min_length=1)  # The project; it is made where there is none.
    entity: str | None = None  # The user or the team that owns the project; null: the default of the account.
    group: str | None = None  # The group of runs to which this one belongs, for example the seeds of one experiment.
    run_name: str | None = None  # The name that the page shows for the run; null: the name of the run directory.


class TrackersConfig(Section):
    """The experiment trackers that get the records of `metrics.jsonl`. TensorBoard always gets them."""

    mlflow: MlflowConfig = MlflowConfig()  # MLflow.
    wandb: WandbConfig = WandbConfig()  # Weights & Biases.


class PrometheusConfig(Section):
    """An HTTP endpoint that Prometheus asks what the trainer is doing."""

    # The port of /metrics; null: there is no endpoint. With ranks=all, rank N of a node has the port N higher.
    port: int | None = Field(default=None, ge=1, le=65535)
    host: str = "127.0.0.1"  # The address that the endpoint listens on; it has no password and no encryption.
    ranks: Literal["first", "all"] = "first"  # Which ranks have an endpoint; the first rank alone knows the rollout.


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
    """Whether the package can be imported; a folder of its name in the working directory is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
