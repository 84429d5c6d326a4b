"""Counts the results of requests to the servers since the last flush."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass, field

from megatron_oreal.types import Metrics


@dataclass(slots=True)
class Throughput:
    """The tokens of one server, and the seconds in which it had requests."""

    num_tokens: int = 0
    busy_seconds: float = 0.0
    num_running: int = 0
    busy_since: float = 0.0

    def settle(self, now: float) -> None:
        if self.num_running:
            self.busy_seconds += now - self.busy_since
        self.busy_since = now


@dataclass(slots=True)
class RequestStatistics:
    """The counts of requests. The event loop counts; any thread may flush."""

    counts: Metrics = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each response, including the wait for a server
    servers: dict[int, Throughput] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] = self.counts.get(name, 0) + number

    def responded(self, seconds: float) -> None:
        with self.lock:
            self.seconds.append(seconds)

    def began(self, server: int) -> None:
        with self.lock:
            throughput = self.servers.setdefault(server, Throughput())
            throughput.settle(time.monotonic())
            throughput.num_running += 1

    def ended(self, server: int, num_tokens: int) -> None:
        with self.lock:
            throughput = self.servers[server]
            throughput.settle(time.monotonic())
            throughput.num_running -= 1
            throughput.num_tokens += num_tokens

    def flush(self) -> Metrics:
        """Returns all counts, and the durations and rates since the last flush."""
        with self.lock:
            metrics: Metrics = {f"rollout/{name}": self.counts.get(name, 0) for name in COUNTS}
            if self.seconds:
                metrics["rollout/response_seconds_median"] = statistics.median(self.seconds)
                metrics["rollout/response_seconds_max"] = max(self.seconds)
            now = time.monotonic()
            for server, throughput in sorted(self.servers.items()):
                throughput.settle(now)
                if throughput.busy_seconds > 0:
                    speed = throughput.num_tokens / throughput.busy_seconds
                    metrics[f"rollout/server{server}_tokens_per_second"] = speed
                throughput.num_tokens, throughput.busy_seconds = 0, 0.0
            self.counts, self.seconds = {}, []
        return metrics


COUNTS = (
    "num_requests",  # requests sent, including repetitions
    "num_retries",  # requests sent again after a failure
    "num_continued",  # requests sent to continue a response that the server had ended too early
    "num_aborted",  # abandoned responses
    "num_server_failures",  # times that a server became dead
    "num_server_restarts",
)
