"""sglang-router before a run's servers: it chooses which of them generates a response.

Weights, pauses and aborts are not its business: they go to each server. It has a key of its own, and knows those that
the servers ask of who generates.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_oreal.engines.sglang.client import ServerError
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.process import ServerSettings, answer, launch_router

START_SECONDS = 120.0  # of the router, and of each change of its servers
POLL_SECONDS = 0.2


class Router:
    """Raises ServerError, also from its methods, when the router does not do what it is asked."""

    def __init__(self, settings: ServerSettings, endpoints: Sequence[Endpoint]) -> None:
        self.process = launch_router(settings)
        try:
            self.wait_for(lambda: self.ask("GET", "/workers") is not None, "did not start")
            for endpoint in endpoints:
                self.add(endpoint)
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> Endpoint:
        """To generate."""
        return self.process.endpoint

    def add(self, endpoint: Endpoint) -> None:
        """Returns when the router sends requests to this server."""
        self.ask("POST", "/workers", {"url": endpoint.url, "api_key": endpoint.api_key})
        self.wait_for(lambda: self.workers().get(endpoint.url, {}).get("is_healthy", False), f"did not take {endpoint}")

    def replace(self, old: Endpoint, new: Endpoint) -> None:
        worker = self.workers().get(old.url)
        if worker is not None:
            self.ask("DELETE", f"/workers/{worker['id']}")
        self.add(new)

    def workers(self) -> dict[str, dict[str, Any]]:
        """What the router knows of each server, by url."""
        known = self.ask("GET", "/workers") or {"workers": []}
        return {worker["url"]: worker for worker in known["workers"]}

    def ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        """The answer; None without one, or where it is an error."""
        status, content = answer(self.endpoint, path, self.endpoint.api_key, method, body)
        return content if 200 <= status < 300 else None

    def wait_for(self, condition: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if not self.process.is_running or time.monotonic() > deadline:
                raise ServerError(f"sglang-router {failure}: {self.process.cause()}; its log: {self.process.log}")
            time.sleep(POLL_SECONDS)

    def close(self) -> None:
        self.process.end_now()
