"""Builds the trackers that the configuration enables."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from megatron_oreal.config import RunConfig, flatten, to_yaml
from megatron_oreal.observability.metrics import read_metrics
from megatron_oreal.observability.mlflow_client import MlflowTracker
from megatron_oreal.observability.trackers import Tracker, TrackerClient
from megatron_oreal.observability.wandb_client import WandbTracker
from megatron_oreal.types import Notify


def build_trackers(config: RunConfig, notify: Notify) -> Iterator[Tracker]:
    """Yields a running tracker for each enabled one, which also receives the earlier steps that it lacks."""
    settings = flatten(yaml.safe_load(to_yaml(config)))
    clients: list[TrackerClient] = []
    if config.trackers.mlflow.enabled:
        clients.append(MlflowTracker(config.trackers.mlflow, config.run_dir, settings))
    if config.trackers.wandb.enabled:
        clients.append(WandbTracker(config.trackers.wandb, config.run_dir, settings))
    for client in clients:
        yield Tracker(client, notify, read_metrics(config.run_dir))
