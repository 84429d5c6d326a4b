"""Runs sglang-router in front of a run's servers; it chooses the server for each response.

Requests about weights, pauses and aborts go directly to each server. The router has its own key, and knows the keys
that the servers require for generation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_oreal.engines.sglang.client import ServerError
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.answers import answer
from megatron_oreal.engines.sglang.servers.process import ServerSettings, launch_router

START_SECONDS = 120.0  # time limit of the router's start, and of each change of its servers
POLL_SECONDS = 0.2


class Router:
    """The router's process. It and its methods raise ServerError if the router fails."""

    def __init__(self, settings: ServerSettings, endpoints: Sequence[Endpoint]) -> None:
        self.process = launch_router(settings)
        try:
            # Before that, another user's process could receive the key
            self.wait_for(self.process.listens, "did not start")
            self.wait_for(lambda: self.ask("GET", "/workers") is not None, "did not start")
            for endpoint in endpoints:
                self.add(endpoint)
        except BaseException:
            self.close()
            raise

    @property
    def endpoint(self) -> Endpoint:
        """Returns the endpoint for generation requests."""
        return self.process.endpoint

    def add(self, endpoint: Endpoint) -> None:
        """Adds a server, and returns when the router sends requests to it."""
        self.ask("POST", "/workers", {"url": endpoint.url, "api_key": endpoint.api_key})
        self.wait_for(lambda: self.workers().get(endpoint.url, {}).get("is_healthy", False), f"did not take {endpoint}")

    def replace(self, old: Endpoint, new: Endpoint) -> None:
        worker = self.workers().get(old.url)
        if worker is not None:
            self.ask("DELETE", f"/workers/{worker['id']}")
        self.add(new)

    def workers(self) -> dict[str, dict[str, Any]]:
        """Returns the router's facts about each server, by URL."""
        known = self.ask("GET", "/workers") or {"workers": []}
        return {worker["url"]: worker for worker in known["workers"]}

    def ask(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        """Returns the router's answer; None without an answer or after an error."""
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
