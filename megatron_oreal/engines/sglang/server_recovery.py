"""Waits for servers while none is left, and finds servers that others have restarted.

While no server is living, requests wait in the pool. The fleet restarts the run's own servers. The owner of the servers
of `endpoints_file` restarts those, and the file, which is read again, names their new addresses. A restarted server has
the weights from disk, so the engine then asks the main threads to send the policy's weights again. All of this runs on
the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from megatron_oreal.engines.sglang.client import ServerError, SglangClient
from megatron_oreal.engines.sglang.server_checks import ServerFacts
from megatron_oreal.engines.sglang.server_pool import Server, ServerPool
from megatron_oreal.engines.sglang.weight_labels import WEIGHTS_FROM_DISK

LOOK_SECONDS = 1.0  # between two checks of dead servers
TELL_SECONDS = 30.0  # between two log lines about the servers that the run waits for
ANSWER_SECONDS = 10.0  # time limit of the first answer of a server that may be back
NUM_NAMED = 3  # servers named in one line

Examine = Callable[[SglangClient], Coroutine[Any, Any, ServerFacts]]
Send = Callable[[], Coroutine[Any, Any, None]]


async def watch_outages(pool: ServerPool, send_again: Send) -> None:
    """Never ends. Requests new weights if only stale servers are left, and ends waits that exceed their limit."""
    begin, next_line = 0.0, 0.0
    while True:
        await asyncio.sleep(0.1)
        if pool.living or pool.is_paused or not pool.has_waiting():
            begin, pool.outage_is_over = 0.0, False
            continue
        now = time.monotonic()
        if not begin:
            begin = next_line = now
        if now - begin >= pool.config.outage_seconds:
            pool.outage_is_over = True
            pool.dispatch()
            begin = 0.0
            continue
        if now >= next_line:
            next_line = now + TELL_SECONDS
            pool.notify(
                f"no SGLang server is left; the rollout has waited {now - begin:.0f} s for one to be started again, at "
                f"most rollout.sglang.outage_seconds={pool.config.outage_seconds:g}: {pool.failure_reasons(False)}"
            )
        if any(server.state == "stale" for server in pool.servers):
            await send_again()


async def watch_for_returns(pool: ServerPool, examine: Examine) -> None:
    """Never ends. Looks for dead servers that somebody else restarts."""
    told: set[str] = set()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        for server in pool.servers:
            if server.state == "dead" and server.may_return and not pool.is_pushing:
                problem = await look_for(pool, server, examine)
                if problem and problem not in told:
                    told.add(problem)
                    pool.notify(problem)


async def look_for(pool: ServerPool, server: Server, examine: Examine) -> str:
    """Revives the server if it answers at its old address or at a new one in the file; returns what is wrong."""
    assert pool.fleet is not None
    used = {other.client.endpoint for other in pool.servers if other is not server}
    for endpoint in await asyncio.to_thread(pool.fleet.candidates, server.client.endpoint):
        if endpoint in used:
            continue
        client = pool.new_client(endpoint)
        try:
            await client.get("/health", ANSWER_SECONDS)
            facts = await examine(client)
        except ServerError:
            await client.close()
            continue
        except ValueError as error:
            await client.close()
            return f"{error}; it stays unused"
        if server.state != "dead" or pool.is_pushing:  # a push has reached the server meanwhile
            await client.close()
            return ""
        await server.client.close()
        server.client, server.facts = client, facts
        server.num_failures, server.num_missed, server.has_stale_requests = 0, 0, True
        server.released.clear()
        is_current = not pool.has_new_weights and facts.weight_version == WEIGHTS_FROM_DISK
        server.state = "living" if is_current else "stale"
        pool.statistics.count("num_server_restarts")
        pool.notify(f"SGLang server {server} is back" + ("" if is_current else ", and waits for the weights"))
        pool.dispatch()
        return ""
    return ""


async def watch_silence(pool: ServerPool) -> None:
    """Never ends. Logs which servers have been silent for TELL_SECONDS, their requests, and their deadlines."""
    while True:
        await asyncio.sleep(TELL_SECONDS / 3)
        now, silent = time.monotonic(), []
        for server in pool.servers:
            request = min(server.client.open_requests, key=lambda each: each.since, default=None)
            if request is None or now - max(request.since, server.client.last_answer) < TELL_SECONDS:
                continue
            if now - server.last_line < TELL_SECONDS:
                continue
            server.last_line = now
            seconds = now - max(request.since, server.client.last_answer)
            silent.append(
                f"{server} for {seconds:.0f} s ({request.what}, "
                f"{len(server.client.open_requests)} under way, at most {max(0.0, request.deadline - now):.0f} s more)"
            )
        if silent:
            rest = f" and {len(silent) - NUM_NAMED} more" if len(silent) > NUM_NAMED else ""
            pool.notify(f"waiting for SGLang server {', '.join(silent[:NUM_NAMED])}{rest}")
