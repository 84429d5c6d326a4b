"""Opens the endpoint for Prometheus, and reads the state of the run for it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_oreal.config import PrometheusConfig
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.observability.endpoint import Endpoint, Observed
from megatron_oreal.run.run import Run
from megatron_oreal.types import Notify


@contextmanager
def open_endpoint(run: Run[Any, Any, Any], config: PrometheusConfig, notify: Notify) -> Iterator[None]:
    """Serves requests inside the block. If the port is not available, the run only logs one line."""
    if config.port is None or not (run.layout.is_main or config.ranks == "all"):
        yield
        return
    port = config.port + int(os.environ.get("LOCAL_RANK", "0")) * (config.ranks == "all")
    try:
        endpoint = Endpoint(config.host, port, lambda: observe(run))
    except OSError as error:
        notify(
            f"prometheus.port: nothing answers at {config.host}:{port} ({error.strerror}); the training goes on. Give "
            "another port or host"
        )
        yield
        return
    notify(f"Prometheus finds this run at http://{config.host}:{endpoint.port}/metrics")
    with endpoint:
        yield


def observe(run: Run[Any, Any, Any]) -> Observed:
    """Reads the state of the run, from any thread."""
    phase, seconds = run.timer.under_way()
    return Observed(
        run=run.config.run_dir.resolve().name,
        rank=run.layout.rank,
        step=run.step,
        num_steps=run.config.num_steps,
        phase=phase,
        phase_seconds=seconds,
        record=run.last_record if run.layout.is_main else {},
        queues=queues(run) if run.layout.is_main else {},
        servers=servers(run) if run.layout.is_main else {},
        gpu_memory_bytes=gpu_memory(run.layout.device),
    )


def queues(run: Run[Any, Any, Any]) -> dict[str, int]:
    """Returns how many groups wait for verdicts, steps for training, requests for servers, and records for trackers."""
    found = {f"records_for_{tracker.client.name}": len(tracker.records) for tracker in run.log.trackers}
    if run.collector is not None:
        pending = run.collector.producer.pending
        found["groups_to_verify"] = pending.judging_time.queue_length if pending is not None else 0
        found["steps_to_train"] = len(run.collector.produced)
    if isinstance(run.engine, SglangEngine):
        pool = run.engine.pool
        found["requests_running"] = sum(server.num_running for server in pool.servers)
        found["requests_waiting"] = len(pool.waiting)
    return found


def servers(run: Run[Any, Any, Any]) -> dict[str, int]:
    """Returns how many servers are living, stale, restarting or dead; empty for an engine without servers."""
    if not isinstance(run.engine, SglangEngine):
        return {}
    states = Counter(server.state for server in run.engine.pool.servers)
    return {state: states[state] for state in ("living", "stale", "restarting", "dead")}


def gpu_memory(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return {}
    return {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "allocated_peak": torch.cuda.max_memory_allocated(device),
        "total": torch.cuda.get_device_properties(device).total_memory,
    }
