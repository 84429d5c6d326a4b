"""Which server gets the next request, and what becomes of one that fails.

A server is living, or dead after `max_failures` failures one after the other. A dead one of ours is started again; its
weights are then those on disk, so it waits, stale, for the next weights. Everything here runs on one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import ServerError, ServerRefusal, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.generate_api import BUSY_STATUSES
from megatron_oreal.engines.sglang.request_statistics import RequestStatistics

Result = TypeVar("Result")
CONTROL_CONNECTIONS = 16  # beside those of the requests
NUM_LOG_LINES = 5
ABORT_SECONDS = 20.0  # until what was given up must have answered
CONTROL_SECONDS, POLL_SECONDS = 60.0, 0.1


class Fleet(Protocol):
    """Who starts servers: `servers.fleet.ServerFleet`."""

    def is_alive(self, endpoint: Endpoint) -> bool: ...

    def restart(self, endpoint: Endpoint) -> Endpoint: ...

    def log_tail(self, endpoint: Endpoint, num_lines: int = ...) -> str: ...


@dataclass(slots=True)
class Server:
    index: int
    client: SglangClient
    state: Literal["living", "dead", "restarting", "stale"] = "living"
    num_running: int = 0
    num_failures: int = 0  # of requests, one after the other
    num_missed: int = 0  # health checks, one after the other
    last_failure: float = 0.0
    released: set[str] = field(default_factory=set)  # of its memory, while the trainer has the devices
    has_orphans: bool = True  # it may still work for somebody who does not wait any more
    obituary: str = ""  # why it counts as dead
    last_words: str = ""  # the end of its log
    requests: set[asyncio.Future[Any]] = field(default_factory=set)  # that wait for its answer

    def __str__(self) -> str:
        return str(self.client.endpoint)


class ServerPool:
    def __init__(
        self,
        config: SglangConfig,
        endpoints: Sequence[Endpoint],
        fleet: Fleet | None,
        statistics: RequestStatistics,
        notify: Callable[[str], None],
        router: Endpoint | None,
    ) -> None:
        self.config, self.fleet, self.statistics, self.notify = config, fleet, statistics, notify
        self.router = None if router is None else self._client(router)
        self.servers = [Server(index, self._client(endpoint)) for index, endpoint in enumerate(endpoints)]
        self.waiting: deque[tuple[asyncio.Future[Server], Server | None]] = deque()
        self.has_new_weights = False  # others than those on disk
        self.is_paused = False
        self.lost: list[SglangClient] = []
        self.background: set[asyncio.Task[Any]] = set()

    def _client(self, endpoint: Endpoint) -> SglangClient:
        return SglangClient(endpoint, self.config.max_concurrent_requests + CONTROL_CONNECTIONS)

    @property
    def living(self) -> list[Server]:
        return [server for server in self.servers if server.state == "living"]

    async def acquire(self, avoid: Server | None = None) -> Server:
        """A living server with room, the least busy one, `avoid` last of all. First come, first served.

        Raises ServerError when no server is left. Every call is paired with `release`.
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
        """Gives servers to those who wait, after any change of either."""
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
        """Empty where a server lives, or comes back with the weights that are wanted; and on ranks without servers."""
        states = {server.state for server in self.servers}
        if not states or "living" in states or ("restarting" in states and not self.has_new_weights):
            return ""
        return f"no SGLang server is left to generate: the same command resumes the run; {self.obituaries()}"

    def obituaries(self) -> str:
        """Why servers count as dead, in one line; then the ends of their logs."""
        dead = [server for server in self.servers if server.state != "living"]
        logs = [f"\nthe log of {server} ends:\n{server.last_words}" for server in dead if server.last_words]
        return "; ".join(server.obituary for server in dead) + "".join(logs)

    def take_lost(self) -> list[SglangClient]:
        """Of the servers that have died since the last call."""
        lost, self.lost = self.lost, []
        return lost

    async def unless_it_dies(self, server: Server, asking: Coroutine[Any, Any, Result]) -> Result:
        """What the server is asked. Raises ServerError when it dies meanwhile."""
        request = asyncio.ensure_future(asking)
        server.requests.add(request)
        try:
            await asyncio.wait({request})
            if request.cancelled():
                raise ServerError(f"SGLang server {server} died before it answered")
            return request.result()
        finally:
            server.requests.discard(request)
            server.has_orphans |= request.cancel() or request.cancelled() or request.exception() is not None

    def succeeded(self, server: Server) -> None:
        server.num_failures = 0

    def failed(self, server: Server, error: ServerError, sent_at: float) -> None:
        """Counts a failed request. Of those that were under way together, one counts."""
        is_busy = isinstance(error, ServerRefusal) and error.status in BUSY_STATUSES
        if server.state != "living" or is_busy or sent_at < server.last_failure:
            return
        server.last_failure = time.monotonic()
        server.num_failures += 1
        if self.has_ended(server) or server.num_failures >= self.config.max_failures:
            self.bury(server, str(error))

    async def watch_health(self, every_seconds: float, timeout_seconds: float) -> None:
        """Finds servers that have ended, or hang: who has requests must answer health checks. Runs for ever."""
        while True:
            await asyncio.sleep(every_seconds)
            for server in self.living:
                if self.has_ended(server):
                    self.bury(server, f"SGLang server {server} has ended")
            asked = [server for server in self.living if server.num_running or server.num_failures]
            if not self.is_paused:
                await asyncio.gather(*(self._check_health(server, timeout_seconds) for server in asked))

    def has_ended(self, server: Server) -> bool:
        return self.fleet is not None and not self.fleet.is_alive(server.client.endpoint)

    async def _check_health(self, server: Server, timeout_seconds: float) -> None:
        try:
            await server.client.get("/health", timeout_seconds)
        except ServerError as error:
            if self.is_paused or server.state != "living":  # a paused server does not answer it
                return
            server.num_missed += 1
            if server.num_missed >= self.config.max_failures:
                self.bury(server, str(error))
        else:
            server.num_missed = 0

    def bury(self, server: Server, reason: str) -> None:
        """Its requests go to other servers; it is started again where it is ours."""
        server.state, server.obituary = "dead", reason
        if self.fleet is not None:
            server.last_words = self.fleet.log_tail(server.client.endpoint, NUM_LOG_LINES)
        self.lost.append(server.client)
        self.statistics.count("num_server_failures")
        self.notify(f"SGLang server {server} counts as dead: {server.obituary}")
        # Behind a router nobody knows whose requests they are.
        for each in self.servers if self.router is not None else [server]:
            for request in each.requests:
                request.cancel()
        if self.fleet is not None:
            server.state = "restarting"
            self.in_background(self._restart(server, self.fleet))
        self.dispatch()

    async def _restart(self, server: Server, fleet: Fleet) -> None:
        try:
            endpoint = await asyncio.to_thread(fleet.restart, server.client.endpoint)
        except (ServerError, ValueError) as error:
            server.state = "dead"
            server.obituary += f"; {error}"
            self.notify(f"SGLang server {server} stays dead: {error}")
        else:
            await server.client.close()
            server.client = self._client(endpoint)
            server.num_failures, server.num_missed, server.has_orphans = 0, 0, False
            server.released.clear()
            server.state = "stale" if self.has_new_weights else "living"
            self.statistics.count("num_server_restarts")
        self.dispatch()

    def in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    @contextmanager
    def ends_at_close(self) -> Iterator[None]:
        """Around what the running task does."""
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


async def end_orphans(server: Server) -> None:
    """Who works for nobody refuses new weights. Requests that somebody waits for are asked again by who waits."""
    if not server.has_orphans:
        return
    await server.client.control("/abort_request", {"rid": "", "abort_all": True}, CONTROL_SECONDS)
    deadline = time.monotonic() + ABORT_SECONDS
    while time.monotonic() < deadline:
        try:
            await server.client.control("/flush_cache", {}, CONTROL_SECONDS)
        except ServerRefusal as refusal:
            if refusal.status != 400:  # something still runs
                raise
            await asyncio.sleep(POLL_SECONDS)
        else:
            server.has_orphans = False
            return
