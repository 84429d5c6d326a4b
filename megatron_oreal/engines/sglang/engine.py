"""Generates with SGLang servers, and exchanges token ids and log-probs with them over HTTP.

One event loop, in its own thread, sends all requests. Any thread may call `generate`, and concurrent calls share the
servers. A failed request is sent to another server. generate_api.py defines the requests and the meaning of log-probs;
README.md in this folder lists the threads.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from megatron_oreal.config import SglangConfig, read_model_shape
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams, Watch, check_prompts
from megatron_oreal.engines.main_thread import CallsClosedError, MainThreadCalls
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.generate_api import (
    Chunk,
    PartialResponse,
    backoff_seconds,
    check_weights_of,
    may_ask_again,
    read_chunk,
)
from megatron_oreal.engines.sglang.request_statistics import RequestStatistics
from megatron_oreal.engines.sglang.server_checks import ServerFacts, check_server
from megatron_oreal.engines.sglang.server_pool import (
    ABORT_SECONDS,
    CONTROL_SECONDS,
    Fleet,
    Server,
    ServerPool,
)
from megatron_oreal.engines.sglang.server_recovery import watch_for_returns, watch_outages, watch_silence
from megatron_oreal.engines.sglang.server_states import describe_server, describe_servers
from megatron_oreal.engines.sglang.weight_labels import WEIGHTS_FROM_DISK, version_of
from megatron_oreal.engines.sglang.weights.push import WeightPusher
from megatron_oreal.engines.sglang.weights.requests import WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import WeightTransport
from megatron_oreal.engines.stop_strings import Decode
from megatron_oreal.parallel.collectives import broadcast_object
from megatron_oreal.types import Notify

MAX_ATTEMPTS = 12  # of one request without a new token, on all servers together
REPEAT_ABORT_SECONDS = 1.0  # a server loses the abort of a request that it has not read yet


@dataclass(slots=True)
class Call:
    """The event loop's state of one call of `generate`."""

    responses: list[PartialResponse]
    finished: SimpleQueue[tuple[int, Generation] | None]  # for the calling thread; None: nothing follows
    is_watched: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    running: dict[int, tuple[str, Server]] = field(default_factory=dict)  # response number -> request id, server
    is_given_up: bool = False


class SglangEngine:
    """A `RolloutEngine`. The first rank has the servers' endpoints; the other ranks have none and only send weights.

    model_path: the servers' model. thread: sends the requests of the engine and of its transport; the engine closes it.
    fleet: restarts dead servers. router: gets the first attempt of each request; further attempts and all other
    requests go directly to the servers. rank: of this process in the trainer. decode: without it, stop strings are not
    sent to the servers. Raises ValueError for an unusable server.
    """

    def __init__(
        self,
        config: SglangConfig,
        model_path: Path,
        endpoints: Sequence[Endpoint],
        transport: WeightTransport,
        thread: EventLoopThread,
        fleet: Fleet | None = None,
        notify: Notify = lambda _line: None,
        router: Endpoint | None = None,
        health_every_seconds: float = 5.0,
        health_timeout_seconds: float = 20.0,  # an idle server generates a token for a health check
        rank: int = 0,
        decode: Decode | None = None,
    ) -> None:
        self.version = 0
        self.calls = MainThreadCalls()  # stays empty, because servers need no rank
        self.has_whole_weights = True  # False after an update that failed
        self.thread, self.is_main, self.decode = thread, rank == 0, decode
        self.is_open = True
        self.statistics = RequestStatistics()
        self.pool = ServerPool(config, endpoints, fleet, self.statistics, notify, router)
        self.pusher = WeightPusher(self.pool, transport, thread, rank)
        self.vocab_size = read_model_shape(model_path).vocab_size
        # Wraps pushes during a rollout, because colocated servers must give the devices to the models.
        self.lending_devices: Callable[[], AbstractContextManager[None]] = nullcontext
        self.stream: Iterable[tuple[str, Tensor]] = ()  # of the last update
        try:
            thread.run(self._open(model_path, health_every_seconds, health_timeout_seconds))
        except BaseException:
            self.close()
            raise

    async def _open(self, model_path: Path, every_seconds: float, timeout_seconds: float) -> None:
        def examine(client: SglangClient) -> Coroutine[Any, Any, ServerFacts]:
            return check_server(client, model_path, self.vocab_size)

        self.pool.in_background(watch_silence(self.pool))
        facts = await asyncio.gather(*(examine(server.client) for server in self.pool.servers))
        for server, fact in zip(self.pool.servers, facts, strict=True):
            server.facts = fact
        self.pool.in_background(self.pool.watch_health(every_seconds, timeout_seconds))
        self.pool.in_background(watch_for_returns(self.pool, examine))
        self.pool.in_background(watch_outages(self.pool, self._ask_for_weights))

    def check_unchanged(self) -> None:
        """Raises ValueError for a server that has received weights, because it no longer has those of `model_path`."""
        for server, facts in self._facts():
            if facts.weight_version != WEIGHTS_FROM_DISK:
                raise ValueError(
                    f"rollout.sglang.endpoints_file: SGLang server {server} has weights of version "
                    f"{version_of(facts.weight_version)} from a training run, not those of model.path: start serve "
                    "again"
                )

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, watch: Watch | None = None
    ) -> list[Generation]:
        """Implements `RolloutEngine`. Calls `watch` in this thread for every response that was not abandoned.

        While the engine is paused, the requests wait. Raises ValueError for a prompt that is empty, too long or not in
        the model's vocabulary, and for settings that the servers do not support; ServerError if no server is left;
        FloatingPointError for non-finite log-probs; RuntimeError if the engine is closed or only partly updated.
        """
        if not (self.is_open and self.is_main and self.has_whole_weights):
            problem = "closed" if not self.is_open else "half updated" if self.is_main else "not on the first rank"
            raise RuntimeError(f"the SGLang engine is {problem}: it cannot generate")
        self._check(requests, params)
        finished: SimpleQueue[tuple[int, Generation] | None] = SimpleQueue()
        call = Call(
            [PartialResponse.of(request, params, self.decode) for request in requests], finished, watch is not None
        )
        future = asyncio.run_coroutine_threadsafe(self._run(call), self.thread.loop)
        future.add_done_callback(lambda _: finished.put(None))
        try:
            while (ended := finished.get()) is not None:
                if watch is not None and watch(*ended):
                    self.thread.loop.call_soon_threadsafe(self._give_up, call)
        except BaseException:
            future.cancel()  # a server ends a request when its connection closes
            raise
        try:
            future.result()
        except CancelledError:
            raise RuntimeError("the SGLang engine was closed while it generated") from None
        return [response.generation() for response in call.responses]

    def _facts(self) -> list[tuple[Server, ServerFacts]]:
        return [(server, server.facts) for server in self.pool.servers if server.facts is not None]

    def take_part(self) -> None:
        """Implements `RolloutEngine`: sends the weights again, to servers that restarted while none was left."""
        if self.is_main:
            self.calls.run_next()
        else:
            self._send_again()

    async def _ask_for_weights(self) -> None:
        """Asks the main threads of all ranks to send the weights again, and waits for it."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def ask() -> None:
            with suppress(CallsClosedError, ServerError):
                self.calls.run(self._send_again)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=ask, name="weights-again", daemon=True).start()
        await sent.wait()

    def _send_again(self) -> None:
        """Collective. Does nothing if the main threads have updated the weights meanwhile."""
        if not broadcast_object(self.pool.has_new_weights and not self.pool.living):
            return
        with self.lending_devices(), suppress(WeightSyncError):  # on all ranks; the caller tries again
            self.pusher.push(self.stream, self.version)

    def _check(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> None:
        check_prompts(requests, self.vocab_size, params)
        longest_prompt = max((len(request.prompt_ids) for request in requests), default=0)
        num_tokens = params.longest_sequence(longest_prompt)
        for server, facts in self._facts():
            if num_tokens > facts.max_tokens:
                raise ValueError(
                    f"rollout.max_new_tokens: the longest prompt and {num_tokens - longest_prompt} tokens make "
                    f"{num_tokens}, SGLang server {server} takes {facts.max_tokens}: lower it, or raise the server's "
                    "context-length or max-total-tokens"
                )
            if facts.has_tempered_logprobs and params.temperature not in (0, 1):
                raise ValueError(
                    f"rollout.temperature={params.temperature:g}: SGLang server {server} gives tempered log-probs: "
                    "start it with SGLANG_RETURN_ORIGINAL_LOGPROB=1"
                )

    async def _run(self, call: Call) -> None:
        loop = asyncio.get_running_loop()
        call.tasks = {index: loop.create_task(self._respond(call, index)) for index in range(len(call.responses))}
        with self.pool.cancelled_at_close():
            try:
                await asyncio.gather(*call.tasks.values())
            finally:
                for task in call.tasks.values():
                    task.cancel()
                await asyncio.gather(*call.tasks.values(), return_exceptions=True)

    async def _respond(self, call: Call, index: int) -> None:
        """Sends requests until the response is complete or abandoned."""
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
                    # The server has stopped at an end token that was not requested, or another client has aborted the
                    # request.
                    self.statistics.count("num_continued")
                num_failures = 0 if len(answer.token_ids) else num_failures + 1
            finally:
                self.pool.release(server)
            if num_failures >= MAX_ATTEMPTS:
                raise ServerError(f"SGLang server {server} has answered {num_failures} times without a token")
            if num_failures and response.num_missing:
                await asyncio.sleep(backoff_seconds(num_failures, index))

    async def _ask(self, call: Call, index: int, server: Server, attempt: int) -> Chunk:
        response = call.responses[index]
        # All ids have one length, because a server aborts every request whose id begins with the given id.
        request_id = f"{call.name}-{index:08d}-{attempt:06d}"
        sent_at, num_tokens = time.monotonic(), 0
        call.running[index] = request_id, server
        self.statistics.count("num_requests")
        self.statistics.began(server.index)
        try:
            client = self._client(server, attempt)
            answer = await self.pool.unless_dead(server, self._generate(client, response, request_id))
            num_tokens = len(answer.token_ids)
        except ServerError as error:
            if client is server.client:  # behind a router, the failing server is unknown
                self.pool.failed(server, error, sent_at)
            raise
        finally:
            call.running.pop(index)
            self.statistics.ended(server.index, num_tokens)
        self.pool.succeeded(server)
        return answer

    def _client(self, server: Server, attempt: int) -> SglangClient:
        """Returns the router's client if all servers have the same weights, because a router knows no versions."""
        router = self.pool.router
        is_routed = router is not None and attempt == 0 and len(self.pool.living) == len(self.pool.servers)
        return router if router is not None and is_routed else server.client

    async def _generate(self, client: SglangClient, response: PartialResponse, request_id: str) -> Chunk:
        """Asks one server. Parses the answer here, before the next one, to keep few objects in memory."""
        body, seconds, version = response.body(request_id), self.pool.config.request_timeout_seconds, self.version
        run_id = self.pusher.run_id if self.pool.has_new_weights else ""
        given = await client.generate(body, seconds)
        answer = read_chunk(given, response.num_missing, client.endpoint, self.vocab_size)
        check_weights_of(answer, run_id, version, client.endpoint)
        return answer

    def _give_up(self, call: Call) -> None:
        if call.is_given_up:
            return
        call.is_given_up = True
        for index, task in call.tasks.items():
            if index not in call.running:  # the request waits for a server
                task.cancel()
        if call.running:
            self.pool.in_background(self._abort(call))

    async def _abort(self, call: Call) -> None:
        """Aborts the running requests. Servers answer with the tokens so far; those of a silent server are lost."""
        deadline = time.monotonic() + ABORT_SECONDS
        while call.running and time.monotonic() < deadline:
            is_routed = self.pool.router is not None  # then any server may have the request
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
        """Collective. Iterates the stream again if a server fails, to send the weights to the other servers.

        Running requests wait meanwhile. Raises ServerError, which names the server, on every rank. After an error the
        engine generates nothing until an update succeeds, and running requests wait for it.
        """
        self.thread.run(self._hold())
        try:
            self.stream = stream
            self.pusher.push(stream, version)
        except BaseException:
            self.has_whole_weights = False
            raise
        self.has_whole_weights = True
        self.version = version
        self.thread.run(self._resume())

    async def _hold(self) -> None:
        """Delays new requests and pauses the servers, which change their weights only while they are idle."""
        was_paused, self.pool.is_paused = self.pool.is_paused, True
        if not was_paused and any(server.num_running for server in self.pool.servers):
            await self._control_all("/pause_generation", {"mode": "retract"})

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
                self.pool.mark_dead(server, str(error))

    def release_memory(self, tags: Sequence[str]) -> None:
        """Frees the "kv_cache" or the "weights" of colocated servers on CUDA, with contents. No request may run."""
        for server in self.pool.servers:
            server.released.update(tags)
        self.thread.run(self._control_all("/release_memory_occupation", {"tags": list(tags)}))

    def resume_memory(self, tags: Sequence[str]) -> None:
        """Allocates the released memory again; a server exits if it is asked to allocate anything else."""
        self.thread.run(self._resume_memory(tags))

    async def _resume_memory(self, tags: Sequence[str]) -> None:
        async def resume(server: Server) -> None:
            released = [tag for tag in tags if tag in server.released]
            server.released.difference_update(tags)
            if released:
                await self._control(server, "/resume_memory_occupation", {"tags": released})

        await asyncio.gather(*map(resume, self.pool.servers))

    def server_states(self) -> tuple[list[str], list[str]]:
        """Returns what this rank knows about the servers, for the description of a hang. Any thread may call it.

        First come sentences about the servers that have not answered, longest wait first; then a line for each server
        and each open request.
        """
        states = {server.client: describe_server(server) for server in self.pool.servers}
        states |= {client: f"SGLang server {client.endpoint}" for client in self.pusher.sender_clients.values()}
        return describe_servers(states, num_waiting=len(self.pool.waiting))

    def flush_metrics(self) -> dict[str, float]:
        return self.statistics.flush() if self.is_main else {}

    def close(self) -> None:
        """Closes all connections. The servers go on; their fleet ends them."""
        if self.is_open:
            self.is_open = False
            self.calls.close()
            self.pusher.close()
            self.thread.run(self.pool.close())
            self.thread.close()
