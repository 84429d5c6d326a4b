"""Serves the current state of this process of a run to Prometheus, at http://HOST:PORT/metrics.

A request only reads values that the run keeps anyway, so an endpoint without requests costs nothing.
`examples/grafana/dashboard.json` uses the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import HTTPServer
from typing import TYPE_CHECKING, Any

from megatron_oreal.observability.closing import Closing
from megatron_oreal.types import Metrics

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily

PREFIX = "megatron_oreal"
PHASES = ("rollout", "update", "weight_sync", "evaluation", "checkpoint", "other")


@dataclass(slots=True, frozen=True)
class Observed:
    """The state of a process of a run. Only the first rank knows the record, the queues and the servers."""

    run: str  # the name of the run directory
    rank: int
    step: int  # the current step
    num_steps: int
    phase: str  # one of PHASES; other means between two phases
    phase_seconds: float  # since the phase began; 0 for other
    record: Metrics  # of the last finished step
    queues: Mapping[str, int] = field(default_factory=dict)  # the queue's name -> its length
    servers: Mapping[str, int] = field(default_factory=dict)  # state -> number of generation servers
    gpu_memory_bytes: Mapping[str, int] = field(default_factory=dict)  # kind -> bytes of this process


class RunCollector:
    """Makes the gauges of an `Observed`. The library calls `collect` at each request, in its own thread."""

    def __init__(self, observe: Callable[[], Observed]) -> None:
        self.observe = observe

    def describe(self) -> list[GaugeMetricFamily]:
        """Yields nothing. Otherwise the registry would collect at its creation, before the run is complete."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        seen = self.observe()
        yield gauge("run_info", "The run and the rank that answer.", {(seen.run, str(seen.rank)): 1}, "run", "rank")
        yield gauge("step", "The step under way.", {(): seen.step})
        yield gauge("num_steps", "The length of the run.", {(): seen.num_steps})
        phases: dict[tuple[str, ...], float] = {(phase,): int(phase == seen.phase) for phase in PHASES}
        yield gauge("phase", "1 for the phase of the step that is under way.", phases, "phase")
        yield gauge("phase_seconds", "How long the phase under way has lasted.", {(): seen.phase_seconds})
        rates: dict[tuple[str, ...], float] = {
            (phase,): seen.record[name]
            for phase in ("rollout", "update")
            if (name := f"time/{phase}_tokens_per_second") in seen.record
        }
        yield gauge("tokens_per_second", "Tokens a second of a phase of the last step.", rates, "phase")
        yield gauge("queue_depth", "How many wait.", by_name(seen.queues), "queue")
        yield gauge("servers", "Generation servers in a state.", by_name(seen.servers), "state")
        yield gauge("gpu_memory_bytes", "Memory of PyTorch on this GPU.", by_name(seen.gpu_memory_bytes), "kind")
        record = {name: value for name, value in seen.record.items() if name != "step"}
        yield gauge("metric", "The last record of metrics.jsonl.", by_name(record), "name")


def gauge(name: str, words: str, values: Mapping[tuple[str, ...], float], *labels: str) -> GaugeMetricFamily:
    """Makes a gauge with one sample for each key of `values`, which holds the values of the labels."""
    from prometheus_client.core import GaugeMetricFamily

    family = GaugeMetricFamily(f"{PREFIX}_{name}", words, labels=labels)
    for label_values, value in values.items():
        family.add_metric(label_values, value)
    return family


def by_name(values: Mapping[str, float]) -> dict[tuple[str, ...], float]:
    return {(name,): value for name, value in values.items()}


class Endpoint(Closing):
    """The HTTP server. Raises OSError for a port in use, or an address that this machine does not have."""

    def __init__(self, host: str, port: int, observe: Callable[[], Observed]) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(RunCollector(observe))
        server: Any
        server, self.thread = start_http_server(port, addr=host, registry=registry)
        self.server: HTTPServer = server
        self.port = self.server.server_port

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
