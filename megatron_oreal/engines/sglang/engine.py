"""The engine of SGLang servers: token ids and log-probs over HTTP, from as many servers as there are.

One event loop in a thread of its own carries all requests. `generate` may be called from any thread, and from several
at once: they share the servers' room. A request that fails goes to another server. What is known of the servers, and
what their log-probs mean, is in `sglang_answers`.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams, Watch, check_prompts
from megatron_oreal.engines.main_thread import MainThreadCalls
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.generate_api import (
    UNSTAMPED,
    Answer,
    Response,
    backoff_seconds,
    may_ask_again,
    read_answer,
)
from megatron_oreal.engines.sglang.request_statistics import RequestStatistics
from megatron_oreal.engines.sglang.server_checks import Served, check_server
from megatron_oreal.engines.sglang.server_pool import (
    ABORT_SECONDS,
    CONTROL_SECONDS,
    POLL_SECONDS,
    Fleet,
    Server,
    ServerPool,
    end_orphans,
)
from megatron_oreal.engines.sglang.weights.requests import WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import WeightTransport, clients_of_rank, raise_together
from megatron_oreal.parallel.collectives import exchanged

MAX_ATTEMPTS = 12  # of one request without a new token, over all servers
REPEAT_ABORT_SECONDS = 1.0  # a server forgets the abort of a request that it has not read yet
MAX_PUSHES = 3  # of the same weights, each without the servers that made the one before fail


@dataclass(slots=True)
class Call:
    """One `generate` under way, on the event loop."""

    responses: list[Response]
    finished: SimpleQueue[tuple[int, Generation] | None]  # to the thread that called; None: all is over
    is_watched: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    running: dict[int, tuple[str, Server]] = field(default_factory=dict)  # request ids, by response
    is_given_up: bool = False


class SglangEngine:
    """A `RolloutEngine`; the first rank has the servers' endpoints, the others none.

    model_path: what the servers serve. thread: carries the requests of the engine and of its transport; the engine
    closes it. fleet: starts dead servers again. router: gets the first attempt of each request; the next ones, and all
    that is not generation, go to the servers themselves. Raises ValueError for a server that cannot be used.
    """

    def __init__(
        self,
        config: SglangConfig,
        model_path: Path,
        endpoints: Sequence[Endpoint],
        transport: WeightTransport,
        thread: EventLoopThread,
        fleet: Fleet | None = None,
        notify: Callable[[str], None] = lambda _line: None,
        router: Endpoint | None = None,
        health_every_seconds: float = 5.0,
        health_timeout_seconds: float = 20.0,  # of an idle server: it generates a token
    ) -> None:
        self.version = 0
        self.calls = MainThreadCalls()  # servers need no rank: it stays empty
        self.has_whole_weights = True  # False after an update that failed
        self.transport, self.thread = transport, thread
        self.is_open = True
        self.statistics = RequestStatistics()
        self.as_sender: dict[Endpoint, SglangClient] = {}  # on the other ranks: the servers that they send weights to
        self.pool = ServerPool(config, endpoints, fleet, self.statistics, notify, router)
        self.vocab_size: int = json.loads((model_path / "config.json").read_bytes())["vocab_size"]
        try:
            self.served = thread.run(self._open(model_path, health_every_seconds, health_timeout_seconds))
        except BaseException:
            self.close()
            raise

    async def _open(self, model_path: Path, every_seconds: float, timeout_seconds: float) -> list[Served]:
        checks = (check_server(server.client, model_path, self.vocab_size) for server in self.pool.servers)
        served = await asyncio.gather(*checks)
        self.pool.in_background(self.pool.watch_health(every_seconds, timeout_seconds))
        return served

    def check_unchanged(self) -> None:
        """Raises ValueError for a server that somebody has sent weights to: its own are gone."""
        for server, served in zip(self.pool.servers, self.served, strict=True):
            if served.weight_version != UNSTAMPED:
                raise ValueError(
                    f"rollout.sglang.endpoints_file: SGLang server {server} has weights of version "
                    f"{served.weight_version} from a training run, not those of model.path: start serve again"
                )

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """See `RolloutEngine`. `watch` is called in this thread, and not told of what was given up.

        While the engine is paused the requests wait. Raises ValueError for a prompt that is empty, too long or not in
        the model's vocabulary, and for settings that the servers cannot do; ServerError when no server is left;
        FloatingPointError when log-probs are not finite; RuntimeError when the engine is closed or half updated.
        """
        if not (self.is_open and self.pool.servers and self.has_whole_weights):
            problem = "closed" if not self.is_open else "half updated" if self.pool.servers else "not on the first rank"
            raise RuntimeError(f"the SGLang engine is {problem}: it cannot generate")
        self._check(requests, params)
        finished: SimpleQueue[tuple[int, Generation] | None] = SimpleQueue()
        call = Call([Response.of(request, params) for request in requests], finished, watch is not None)
        future = asyncio.run_coroutine_threadsafe(self._run(call), self.thread.loop)
        future.add_done_callback(lambda _: finished.put(None))
        try:
            while (ended := finished.get()) is not None:
                if watch is not None and watch(*ended):
                    self.thread.loop.call_soon_threadsafe(self._give_up, call)
        except BaseException:
            future.cancel()  # the servers end what nobody waits for
            raise
        try:
            future.result()
        except CancelledError:
            raise RuntimeError("the SGLang engine was closed while it generated") from None
        return [response.generation() for response in call.responses]

    def take_part(self) -> None:
        """See `RolloutEngine`: servers generate without the ranks."""

    def _check(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
        check_prompts(requests, self.vocab_size)
        num_tokens = max((len(request.prompt_ids) for request in requests), default=0) + params.max_new_tokens
        for server, served in zip(self.pool.servers, self.served, strict=True):
            if num_tokens > served.max_tokens:
                raise ValueError(
                    f"rollout.max_new_tokens: the longest prompt and {params.max_new_tokens} tokens make {num_tokens}, "
                    f"SGLang server {server} takes {served.max_tokens}: lower it, or raise the server's context-length "
                    "or max-total-tokens"
                )
            if served.has_tempered_logprobs and params.temperature not in (0, 1):
                raise ValueError(
                    f"rollout.temperature={params.temperature:g}: SGLang server {server} gives tempered log-probs: "
                    "start it with SGLANG_RETURN_ORIGINAL_LOGPROB=1"
                )

    async def _run(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        call.tasks = {index: loop.create_task(self._respond(call, index)) for index in range(len(call.responses))}
        with self.pool.ends_at_close():
            try:
                await asyncio.gather(*call.tasks.values())
            finally:
                for task in call.tasks.values():
                    task.cancel()
                await asyncio.gather(*call.tasks.values(), return_exceptions=True)

    async def _respond(self, call: Call, index: int) -> None:
        """Asks until the response is whole, or given up."""
        response, begin = call.responses[index], time.monotonic()
        try:
            await self._complete(call, index)
        except asyncio.CancelledError:
            if not call.is_given_up:
                raise
        if response.num_missing:
            self.statistics.count("num_aborted")
            return
        self.statistics.responded(time.monotonic() - begin)
        if call.is_watched:
            call.finished.put((index, response.generation()))

    async def _complete(self, call: Call, index: int) -> None:
        response, num_failures = call.responses[index], 0
        avoid: Server | None = None
        for attempt in count():
            if not response.num_missing or call.is_given_up:
                return
            server = await self.pool.acquire(avoid)
            try:
                answer = await self._ask(call, index, server, attempt)
            except ServerError as error:
                if not may_ask_again(error):
                    raise
                num_failures += 1
                if num_failures >= MAX_ATTEMPTS:
                    raise ServerError(f"{error}; given up after {num_failures} attempts") from None
                self.statistics.count("num_retries")
                avoid = server
            else:
                response.add(answer)
                if response.num_missing and not call.is_given_up:
                    # The server's own end token, which was not asked for, or somebody else's abort.
                    self.statistics.count("num_continued")
                num_failures = 0 if answer.token_ids else num_failures + 1
            finally:
                self.pool.release(server)
            if num_failures >= MAX_ATTEMPTS:
                raise ServerError(f"SGLang server {server} has answered {num_failures} times without a token")
            if num_failures and response.num_missing:
                await asyncio.sleep(backoff_seconds(num_failures, index))

    async def _ask(self, call: Call, index: int, server: Server, attempt: int) -> Answer:
        response = call.responses[index]
        # Of one length: a server aborts every request whose id begins with what it is given.
        request_id = f"{call.name}-{index:08d}-{attempt:06d}"
        sent_at, num_tokens = time.monotonic(), 0
        call.running[index] = request_id, server
        self.statistics.count("num_requests")
        self.statistics.began(server.index)
        try:
            client = self._client(server, attempt)
            answer = await self.pool.unless_it_dies(server, self._generate(client, response, request_id))
            num_tokens = len(answer.token_ids)
        except ServerError as error:
            if client is server.client:  # behind a router it may be the fault of another one
                self.pool.failed(server, error, sent_at)
            raise
        finally:
            call.running.pop(index)
            self.statistics.ended(server.index, num_tokens)
        self.pool.succeeded(server)
        return answer

    def _client(self, server: Server, attempt: int) -> SglangClient:
        """The router's while all servers have the weights that are wanted: it does not know about them."""
        router = self.pool.router
        is_routed = router is not None and attempt == 0 and len(self.pool.living) == len(self.pool.servers)
        return router if router is not None and is_routed else server.client

    async def _generate(self, client: SglangClient, response: Response, request_id: str) -> Answer:
        """Read at once: a hundred parsed answers that wait for their turn would keep the garbage collector busy."""
        body, seconds, version = response.body(request_id), self.pool.config.request_timeout_seconds, self.version
        answer = read_answer(await client.generate(body, seconds), response.num_missing, client.endpoint)
        if min(answer.policy_versions, default=version) < version:
            raise ServerError(f"SGLang server {client.endpoint} has weights older than version {version}")
        return answer

    def _give_up(self, call: Call) -> None:
        if call.is_given_up:
            return
        call.is_given_up = True
        for index, task in call.tasks.items():
            if index not in call.running:  # it waits for a server
                task.cancel()
        if call.running:
            self.pool.in_background(self._abort(call))

    async def _abort(self, call: Call) -> None:
        """The servers answer with what there is; from one that does not, it is lost."""
        deadline = time.monotonic() + ABORT_SECONDS
        while call.running and time.monotonic() < deadline:
            is_routed = self.pool.router is not None  # then any server may have it
            asked = [
                each.client.control("/abort_request", {"rid": request_id}, CONTROL_SECONDS)
                for request_id, server in call.running.values()
                for each in (self.pool.servers if is_routed else [server])
            ]
            await asyncio.gather(*asked, return_exceptions=True)
            tasks = [call.tasks[index] for index in call.running]
            if tasks:
                await asyncio.wait(tasks, timeout=REPEAT_ABORT_SECONDS)
        for index in call.running:
            call.tasks[index].cancel()

    def update_weights(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Collective. The stream can be iterated again: where a server fails, the others get the weights once more.

        Generation under way waits meanwhile. Raises ServerError naming the server, on every rank; after that the engine
        generates nothing until an update succeeds, and what is under way waits for it.
        """
        self.thread.run(self._hold())
        try:
            self._push(stream, version)
        except BaseException:
            self.has_whole_weights = False
            raise
        self.has_whole_weights = True
        self.version = version
        self.thread.run(self._resume())

    async def _hold(self) -> None:
        """Nothing new is asked, and the servers stop what they do: they change their weights only when idle."""
        was_paused, self.pool.is_paused = self.pool.is_paused, True
        if not was_paused and any(server.num_running for server in self.pool.servers):
            await self._control_all("/pause_generation", {"mode": "retract"})

    def _push(self, stream: Iterable[tuple[str, Tensor]], version: int) -> None:
        for attempt in range(1, MAX_PUSHES + 1):
            servers = self.thread.run(self._reachable_servers())
            failure = None
            if self.pool.servers and not servers:
                failure = WeightSyncError(f"no SGLang server is left; {self.pool.obituaries()}", [])
            raise_together(failure, f"weights of version {version}: ")
            for client in self.pool.take_lost():
                self.transport.forget(client)
            try:
                self.transport.push(stream, version, self._clients_of_this_rank(servers))
            except WeightSyncError as error:
                if attempt == MAX_PUSHES or not error.urls:
                    raise
                self.thread.run(self._bury_all(error))
            else:
                self.thread.run(self._take_up(servers))
                return

    def _clients_of_this_rank(self, servers: Sequence[Server]) -> list[SglangClient]:
        """Collective. The first `weight_senders` ranks share the first rank's servers out."""
        clients = {server.client.endpoint: server.client for server in servers}
        endpoints = exchanged(list(clients))[0]
        rank = dist.get_rank() if dist.is_initialized() else 0
        mine = clients_of_rank(endpoints, rank, self.pool.config.weight_senders)
        if rank == 0:
            return [clients[endpoint] for endpoint in mine]
        for endpoint in self.as_sender.keys() - {*endpoints}:  # it has died
            client = self.as_sender.pop(endpoint)
            self.transport.forget(client)
            self.thread.run(client.close())
        return [self.as_sender.setdefault(endpoint, SglangClient(endpoint)) for endpoint in mine]

    async def _reachable_servers(self) -> list[Server]:
        """All but those that are being started: those that counted as dead too, for somebody may have started them.

        Without any other, it waits for those.
        """
        deadline = time.monotonic() + self.pool.config.start_timeout_seconds
        while {server.state for server in self.pool.servers} <= {"dead", "restarting"} and time.monotonic() < deadline:
            if not any(server.state == "restarting" for server in self.pool.servers):
                break
            await asyncio.sleep(POLL_SECONDS)

        async def is_reachable(server: Server) -> bool:
            try:
                await server.client.get("/model_info", CONTROL_SECONDS)
                await end_orphans(server)
            except ServerError as error:
                if server.state in ("living", "stale"):
                    self.pool.bury(server, str(error))
                return False
            return True

        asked = [server for server in self.pool.servers if server.state != "restarting"]
        answers = await asyncio.gather(*map(is_reachable, asked))
        return [server for server, answer in zip(asked, answers, strict=True) if answer]

    async def _bury_all(self, error: WeightSyncError) -> None:
        for server in self.pool.servers:
            if server.client.endpoint.url in error.urls and server.state in ("living", "stale"):
                self.pool.bury(server, str(error))

    async def _take_up(self, servers: Sequence[Server]) -> None:
        """Only these have the weights."""
        self.pool.has_new_weights = True
        for server in self.pool.servers:
            if server in servers and server.state != "restarting":
                server.state, server.num_failures, server.num_missed = "living", 0, 0
            elif server.state == "living":
                server.state = "stale"
        self.pool.dispatch()

    async def _resume(self) -> None:
        await self._control_all("/continue_generation", {})
        for server in self.pool.servers:
            server.num_missed = 0
        self.pool.is_paused = False
        self.pool.dispatch()

    async def _control_all(self, path: str, body: dict[str, Any]) -> None:
        await asyncio.gather(*(self._control(server, path, body) for server in self.pool.servers))

    async def _control(self, server: Server, path: str, body: dict[str, Any]) -> None:
        if server.state not in ("living", "stale"):
            return
        try:
            await server.client.control(path, body, CONTROL_SECONDS)
        except ServerError as error:
            if server.state in ("living", "stale"):
                self.pool.bury(server, str(error))

    def release_memory(self, tags: Sequence[str]) -> None:
        """Of colocated servers on CUDA: "kv_cache", "weights". What was there is lost; nothing may be under way."""
        for server in self.pool.servers:
            server.released.update(tags)
        self.thread.run(self._control_all("/release_memory_occupation", {"tags": list(tags)}))

    def resume_memory(self, tags: Sequence[str]) -> None:
        """What has been released: a server ends itself when it is asked for anything else."""
        self.thread.run(self._resume_memory(tags))

    async def _resume_memory(self, tags: Sequence[str]) -> None:
        async def resume(server: Server) -> None:
            released = [tag for tag in tags if tag in server.released]
            server.released.difference_update(tags)
            if released:
                await self._control(server, "/resume_memory_occupation", {"tags": released})

        await asyncio.gather(*map(resume, self.pool.servers))

    def flush_metrics(self) -> dict[str, float]:
        return self.statistics.flush() if self.pool.servers else {}

    def close(self) -> None:
        """The servers stay; who started them ends them."""
        if self.is_open:
            self.is_open = False
            self.transport.close()
            self.thread.run(self.pool.close())
            for client in self.as_sender.values():
                self.thread.run(client.close())
            self.thread.close()
