"""Pushes weights to all reachable servers, and again to the remaining ones if one fails during a push."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.server_pool import (
    CONTROL_SECONDS,
    POLL_SECONDS,
    Server,
    ServerPool,
    abort_stale_requests,
)
from megatron_oreal.engines.sglang.weight_labels import new_run_id, run_of
from megatron_oreal.engines.sglang.weights.requests import WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import WeightTransport, clients_of_rank, raise_push_failure
from megatron_oreal.parallel.collectives import broadcast_object
from megatron_oreal.weights.stream_filters import Stream

MAX_PUSHES = 3  # of the same weights; each push leaves out the servers that made the previous one fail


class WeightPusher:
    """One trainer rank's part in the pushes. Only the first rank's pool has servers.

    The main thread calls `push` and `close`; their requests to the servers run on the event loop.
    """

    def __init__(self, pool: ServerPool, transport: WeightTransport, thread: EventLoopThread, rank: int) -> None:
        self.pool, self.transport, self.thread = pool, transport, thread
        self.rank, self.is_main = rank, rank == 0
        self.run_id = ""  # the first rank creates it at the first push
        self.others = ""  # how another run has changed one of our servers
        self.sender_clients: dict[Endpoint, SglangClient] = {}  # of this rank's servers; empty on the first rank

    def push(self, stream: Stream, version: int) -> None:
        """Collective. Raises WeightSyncError on every rank if no server is left, or after MAX_PUSHES failures."""
        self.transport.run_id = self.run_id = self.run_id or broadcast_object(new_run_id())
        failed: set[SglangClient] = set()  # a restarted server has another client
        for attempt in range(1, MAX_PUSHES + 1):
            reachable = self.thread.run(self._reachable_servers())
            servers = [server for server in reachable if server.client not in failed]
            failure = None
            if self.is_main and not servers:
                failure = WeightSyncError(f"no SGLang server is left; {self.pool.failure_reasons()}")
            if self.others:
                failure = WeightSyncError(self.others)
            raise_push_failure(failure, f"weights of version {version}: ")
            for client in self.pool.pop_dead():
                self.transport.forget(client)
            self.pool.is_pushing = True
            try:
                self.transport.push(stream, version, self._clients_of_this_rank(servers))
            except WeightSyncError as error:
                if attempt == MAX_PUSHES or not error.urls:
                    raise
                failed |= {server.client for server in servers if server.client.endpoint.url in error.urls}
                self.thread.run(self._mark_all_dead(error))
            else:
                self.thread.run(self._mark_current(servers))
                return
            finally:
                self.pool.is_pushing = False

    def _clients_of_this_rank(self, servers: Sequence[Server]) -> list[SglangClient]:
        """Collective. The first rank names the reachable servers; the first `weight_senders` ranks divide them."""
        clients = {server.client.endpoint: server.client for server in servers}
        endpoints = broadcast_object(list(clients))
        mine = clients_of_rank(endpoints, self.rank, self.pool.config.weight_senders)
        if self.is_main:
            return [clients[endpoint] for endpoint in mine]
        for endpoint in self.sender_clients.keys() - {*endpoints}:  # this server has died
            client = self.sender_clients.pop(endpoint)
            self.transport.forget(client)
            self.thread.run(client.close())
        return [self.sender_clients.setdefault(endpoint, SglangClient(endpoint)) for endpoint in mine]

    async def _reachable_servers(self) -> list[Server]:
        """Returns the servers that answer. Waits only if every server that is not dead is being started.

        Also asks a dead server, because somebody may have restarted it.
        """
        seconds = self.pool.config.start_timeout_seconds
        if any(server.may_return for server in self.pool.servers):
            seconds = min(seconds, self.pool.config.outage_seconds)
        deadline = time.monotonic() + seconds
        while {server.state for server in self.pool.servers} <= {"dead", "restarting"} and time.monotonic() < deadline:
            if not any(server.state == "restarting" or server.may_return for server in self.pool.servers):
                break
            await asyncio.sleep(POLL_SECONDS)

        async def is_reachable(server: Server) -> bool:
            try:
                info = await server.client.get("/model_info", CONTROL_SECONDS)
                self._look_for_others(server, str(info.get("weight_version", "")))
                await abort_stale_requests(server)
            except ServerError as error:
                if server.state in ("living", "stale"):
                    self.pool.mark_dead(server, str(error))
                return False
            return True

        # If one of our servers has ended, another user's process may listen there now.
        asked = [
            server for server in self.pool.servers if server.state != "restarting" and not self.pool.has_ended(server)
        ]
        answers = await asyncio.gather(*map(is_reachable, asked))
        return [server for server, answer in zip(asked, answers, strict=True) if answer]

    def _look_for_others(self, server: Server, label: str) -> None:
        """Detects a server that has had our weights and now has those of another run, because both runs use it."""
        if server.state == "living" and self.pool.has_new_weights and run_of(label) not in ("", self.run_id):
            self.others = (
                f"SGLang server {server} has weights of another run ({run_of(label)}), which has sent them there "
                "meanwhile: give each run servers of its own"
            )

    async def _mark_all_dead(self, error: WeightSyncError) -> None:
        for server in self.pool.servers:
            if server.client.endpoint.url in error.urls and server.state in ("living", "stale"):
                self.pool.mark_dead(server, str(error))

    async def _mark_current(self, servers: Sequence[Server]) -> None:
        """Marks `servers` as current: only they have the new weights and may generate."""
        self.pool.has_new_weights = True
        for server in self.pool.servers:
            if server in servers and server.state != "restarting":
                server.state, server.num_failures, server.num_missed = "living", 0, 0
            elif server.state == "living":
                server.state = "stale"
        self.pool.dispatch()

    def close(self) -> None:
        self.transport.close()
        for client in self.sender_clients.values():
            self.thread.run(client.close())
