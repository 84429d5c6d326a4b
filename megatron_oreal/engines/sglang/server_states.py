"""Describes the servers and their open requests, as this process knows them.

The watchdog calls this when the run hangs, possibly because the event loop hangs, so nothing here waits for the loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from megatron_oreal.engines.sglang.client import SglangClient
from megatron_oreal.engines.sglang.server_pool import Server


def describe_server(server: Server) -> str:
    parts = [
        f"SGLang server {server} is {server.state}",
        f"{server.num_running} responses are under way",
        f"{server.num_failures} failures and {server.num_missed} missed health checks since the last success",
    ]
    if server.failure_reason:
        parts.append(f"it counted as dead: {server.failure_reason}")
    return "; ".join(parts)


def describe_servers(states: Mapping[SglangClient, str], num_waiting: int) -> tuple[list[str], list[str]]:
    """Returns sentences about the servers that have not answered, and lines about all servers and open requests.

    states: the state of each client's server; num_waiting: requests that wait for a server.
    """
    now = time.monotonic()
    asked: list[tuple[float, str]] = []
    lines = [f"{num_waiting} requests wait for a server"] if states else []
    for client, state in states.items():
        lines.append(state)
        requests = sorted(client.open_requests, key=lambda request: request.since)
        for request in requests:
            name = f" {request.request_id}" if request.request_id else ""
            lines.append(f"    {request.what}{name}: no answer for {now - request.since:.1f} s")
        if requests:
            seconds = now - requests[0].since
            sentence = (
                f"SGLang server {client.endpoint} has not answered {len(requests)} requests, the oldest "
                f"({requests[0].what}) for {seconds:.0f} s"
            )
            asked.append((-seconds, sentence))
    return [sentence for _, sentence in sorted(asked)], lines
