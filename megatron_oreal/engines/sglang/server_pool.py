"""Chooses the server for each request and handles failing servers.

A server counts as dead after `max_failures` consecutive failures. The fleet restarts the run's own servers. A restarted
server has the weights on disk, so it is "stale" and gets no requests until the next weights arrive. All code here runs
on the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import ServerError, ServerRefusal, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.generate_api import BUSY_STATUSES
from megatron_oreal.engines.sglang.request_statistics import RequestStatistics
from megatron_oreal.engines.sglang.server_checks import ServerFacts
from megatron_oreal.types import Notify

Result = TypeVar("Result")
CONTROL_CONNECTIONS = 16  # to each server, besides those of the generation requests
NUM_LOG_LINES = 5
ABORT_SECONDS = 20.0  # time limit of a server's answers to aborted requests
CONTROL_SECONDS, POLL_SECONDS = 60.0, 0.1


class Fleet(Protocol):
    """Starts and restarts servers. `servers.fleet.ServerFleet` implements it."""

    def is_alive(self, endpoint: Endpoint) -> bool: ...

    def candidates(self, endpoint: Endpoint) -> list[Endpoint]:
        """Returns the possible addresses of a server that others restart; empty for a server that does not return."""

    def restart(self, endpoint: Endpoint) -> Endpoint: ...

    def log_tail(self, endpoint: Endpoint, num_lines: int = ...) -> str: ...


@dataclass(slots=True)
class Server:
    index: int
    client: SglangClient
    state: Literal["living", "dead", "restarting", "stale"] = "living"
    num_running: int = 0
    num_failures: int = 0  # failed requests since the last success
    num_missed: int = 0  # health checks without an answer since the last answer
    last_failure: float = 0.0
    released: set[str] = field(default_factory=set)  # kinds of memory that it has released for the trainer
    has_stale_requests: bool = True  # it may still generate for an earlier client
    facts: ServerFacts | None = None  # what it has reported about itself
    may_return: bool = False  # whether somebody else restarts it
    last_line: float = 0.0  # when the log last said that the run waits for it
    failure_reason: str = ""  # why the server is dead
    log_tail: str = ""  # the last lines of its log when it died
    requests: set[asyncio.Future[Any]] = field(default_factory=set)  # requests that wait for its answer

    def __str__(self) -> str:
        return str(self.client.endpoint)


class ServerPool:
    def __init__(
        self,
        config: SglangConfig,
        endpoints: Sequence[Endpoint],
        fleet: Fleet | None,
        statistics: RequestStatistics,
        notify: Notify,
        router: Endpoint | None,
    ) -> None:
        self.config, self.fleet, self.statistics, self.notify = config, fleet, statistics, notify
        self.router = None if router is None else self.new_client(router)
        self.servers = [Server(index, self.new_client(endpoint)) for index, endpoint in enumerate(endpoints)]
        self.waiting: deque[tuple[asyncio.Future[Server], Server | None]] = deque()
        self.has_new_weights = False  # True: the current weights differ from those on disk
        self.is_paused = False
        self.is_pushing = False
        self.outage_is_over = False  # no server has returned in time
        self.newly_dead: list[SglangClient] = []
        self.background: set[asyncio.Task[Any]] = set()  # tasks that end when the pool closes

    def new_client(self, endpoint: Endpoint) -> SglangClient:
        return SglangClient(endpoint, self.config.max_concurrent_requests + CONTROL_CONNECTIONS)

    @property
    def living(self) -> list[Server]:
        return [server for server in self.servers if server.state == "living"]

    async def acquire(self, avoid: Server | None = None) -> Server:
        """Waits for the least busy living server with free capacity; uses `avoid` only if there is no other.

        Callers get servers in order of arrival. Raises ServerError if no server is left. The caller must call `release`
        afterwards.
        """
        turn: asyncio.Future[Server] = asyncio.get_running_loop().create_future()
        self.waiting.append((turn, avoid))
        self.dispatch()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(turn.result())
            raise

    def release(self, server: Server) -> None:
        server.num_running -= 1
        self.dispatch()

    def dispatch(self) -> None:
        """Assigns servers to waiting callers. Must be called after every change of the servers or the callers."""
        reason = self.why_none_is_left()
        while self.waiting:
            turn, avoid = self.waiting[0]
            if turn.done():
                self.waiting.popleft()
            elif reason:
                turn.set_exception(ServerError(reason))
            elif (server := self._choose(avoid)) is not None:
                server.num_running += 1
                turn.set_result(server)
            else:
                return

    def _choose(self, avoid: Server | None) -> Server | None:
        if self.is_paused:
            return None
        room = [server for server in self.living if server.num_running < self.config.max_concurrent_requests]
        return min(room, key=lambda server: (server is avoid, server.num_running), default=None)

    def why_none_is_left(self) -> str:
        """Returns why no server can generate; empty while a server is living, or may be again in time.

        Also returns an empty text on ranks without servers.
        """
        states = {server.state for server in self.servers}
        if not states or "living" in states:
            return ""
        may_come = states & {"restarting", "stale"} or any(server.may_return for server in self.servers)
        if may_come and not self.outage_is_over:
            return ""
        waited = f" within rollout.sglang.outage_seconds={self.config.outage_seconds:g}" if may_come else ""
        return (
            f"no SGLang server is left to generate{waited}: the same command resumes the run; {self.failure_reasons()}"
        )

    def has_waiting(self) -> bool:
        return any(not turn.done() for turn, _ in self.waiting)

    def failure_reasons(self, with_logs: bool = True) -> str:
        """Returns one line with the reasons why servers are dead, and the ends of their logs."""
        dead = [server for server in self.servers if server.state != "living"]
        logs = [f"\nthe log of {server} ends:\n{server.log_tail}" for server in dead if server.log_tail and with_logs]
        return "; ".join(server.failure_reason for server in dead) + "".join(logs)

    def pop_dead(self) -> list[SglangClient]:
        """Returns the clients of the servers that have died since the last call."""
        newly_dead, self.newly_dead = self.newly_dead, []
        return newly_dead

    async def unless_dead(self, server: Server, asking: Coroutine[Any, Any, Result]) -> Result:
        """Awaits a server's answer. Raises ServerError if the server is marked dead meanwhile."""
        request = asyncio.ensure_future(asking)
        server.requests.add(request)
        try:
            await asyncio.wait({request})
            if request.cancelled():
                raise ServerError(f"SGLang server {server} died before it answered")
            return request.result()
        finally:
            server.requests.discard(request)
            server.has_stale_requests |= request.cancel() or request.cancelled() or request.exception() is not None

    def succeeded(self, server: Server) -> None:
        server.num_failures = 0

    def failed(self, server: Server, error: ServerError, sent_at: float) -> None:
        """Counts a failed request. Concurrent requests that all failed count as one failure."""
        is_busy = isinstance(error, ServerRefusal) and error.status in BUSY_STATUSES
        if server.state != "living" or is_busy or sent_at < server.last_failure:
            return
        server.last_failure = time.monotonic()
        server.num_failures += 1
        if self.has_ended(server) or server.num_failures >= self.config.max_failures:
            self.mark_dead(server, str(error))

    async def watch_health(self, every_seconds: float, timeout_seconds: float) -> None:
        """Never ends. Marks servers dead that have ended or hang; a server with requests must answer health checks."""
        while True:
            await asyncio.sleep(every_seconds)
            for server in self.living:
                if self.has_ended(server):
                    self.mark_dead(server, f"SGLang server {server} has ended")
            asked = [server for server in self.living if server.num_running or server.num_failures]
            if not self.is_paused:
                await asyncio.gather(*(self._check_health(server, timeout_seconds) for server in asked))

    def has_ended(self, server: Server) -> bool:
        return self.fleet is not None and not self.fleet.is_alive(server.client.endpoint)

    async def _check_health(self, server: Server, timeout_seconds: float) -> None:
        try:
            await server.client.get("/health", timeout_seconds)
        except ServerError as error:
            if self.is_paused or server.state != "living":  # a paused server does not answer health checks
                return
            server.num_missed += 1
            if server.num_missed >= self.config.max_failures:
                self.mark_dead(server, str(error))
        else:
            server.num_missed = 0

    def mark_dead(self, server: Server, reason: str) -> None:
        """Moves the server's requests to other servers. The fleet, if there is one, restarts the server."""
        server.state, server.failure_reason = "dead", reason
        if self.fleet is not None:
            server.log_tail = self.fleet.log_tail(server.client.endpoint, NUM_LOG_LINES)
        self.newly_dead.append(server.client)
        self.statistics.count("num_server_failures")
        self.notify(f"SGLang server {server} counts as dead: {server.failure_reason}")
        # Behind a router any request may be on this server.
        for holder in self.servers if self.router is not None else [server]:
            for request in holder.requests:
                request.cancel()
        server.may_return = self.fleet is not None and bool(self.fleet.candidates(server.client.endpoint))
        if self.fleet is not None and not server.may_return:
            server.state = "restarting"
            self.in_background(self._restart(server, self.fleet))
        self.dispatch()

    async def _restart(self, server: Server, fleet: Fleet) -> None:
        try:
            endpoint = await asyncio.to_thread(fleet.restart, server.client.endpoint)
        except (ServerError, ValueError) as error:
            server.state = "dead"
            server.failure_reason += f"; {error}"
            self.notify(f"SGLang server {server} stays dead: {error}")
        else:
            await server.client.close()
            server.client = self.new_client(endpoint)
            server.num_failures, server.num_missed, server.has_stale_requests = 0, 0, False
            server.released.clear()
            server.state = "stale" if self.has_new_weights else "living"
            self.statistics.count("num_server_restarts")
        self.dispatch()

    def in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    @contextmanager
    def cancelled_at_close(self) -> Iterator[None]:
        """Makes `close` cancel the running task while it is in the block."""
        task = asyncio.current_task()
        assert task is not None
        self.background.add(task)
        try:
            yield
        finally:
            self.background.discard(task)

    async def close(self) -> None:
        for task in self.background:
            task.cancel()
        await asyncio.gather(*self.background, return_exceptions=True)
        clients = [server.client for server in self.servers] + ([self.router] if self.router is not None else [])
        await asyncio.gather(*(client.close() for client in clients))


async def abort_stale_requests(server: Server) -> None:
    """Aborts the requests of earlier clients, because a generating server refuses new weights.

    If this aborts requests of this engine too, their callers send them again.
    """
    if not server.has_stale_requests:
        return
    await server.client.control("/abort_request", {"rid": "", "abort_all": True}, CONTROL_SECONDS)
    deadline = time.monotonic() + ABORT_SECONDS
    while time.monotonic() < deadline:
        try:
            await server.client.control("/flush_cache", {}, CONTROL_SECONDS)
        except ServerRefusal as refusal:
            if refusal.status != 400:  # status 400: a request still runs
                raise
            await asyncio.sleep(POLL_SECONDS)
        else:
            server.has_stale_requests = False
            return
