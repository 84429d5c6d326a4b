"""Imitates SGLang's HTTP API without a model or a GPU, to test how the engine handles answers.

A response depends only on the prompt: its tokens count up from the prompt's last token. Tests change the server's
answers with `faults` and read its requests in `seen`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from megatron_oreal.engines.sglang.client import EventLoopThread
from megatron_oreal.engines.sglang.endpoints import Endpoint

VOCAB_SIZE = 64
Body = dict[str, Any]
Fault = Callable[
    [Body], "str | int | Body | None"
]  # a status, "cut", "hang", "garbage", or fields that replace those of the answer


def token_logprob(token_id: int) -> float:
    return -0.125 * (1 + token_id % 8)


def expected_ids(prompt_ids: list[int], count: int) -> list[int]:
    return [(prompt_ids[-1] + 1 + number) % VOCAB_SIZE for number in range(count)]


@dataclass
class StubServer:
    model_path: Path
    api_key: str = "the api key"
    admin_key: str = "the admin key"
    weight_version: str = "default"
    faults: list[Fault | str | int | None] = field(default_factory=list)  # for the next requests to /generate
    faults_of: dict[str, int | str] = field(default_factory=dict)  # by path, for all requests
    is_healthy: bool = True
    seen: list[tuple[str, Body]] = field(default_factory=list)  # the requests, except the checks at the start
    gate: asyncio.Event | None = None  # requests wait until it is set
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    runner: web.AppRunner | None = None
    url: str = ""

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(self.url, self.api_key, self.admin_key)

    def asked(self, path: str) -> list[Body]:
        return [body for seen_path, body in self.seen if seen_path == path]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Authorization", "").removeprefix("Bearer ")
        is_admin = request.method == "POST" and request.path not in ("/generate",)
        if key != (self.admin_key if is_admin else self.api_key):
            return web.Response(status=401, text="wrong key")
        body: Body = json.loads(await request.read() or b"{}")
        self.seen.append((request.path, body))
        fault = self.faults_of.get(request.path)
        if fault is not None:
            return await self.broken(request, fault)
        if request.method == "GET" and request.path in ("/generate", "/abort_request", "/pause_generation"):
            return web.Response(status=405)
        if request.method == "GET" and request.path == "/continue_generation":
            return web.Response(status=405)
        return await self.answered(request, body)

    async def answered(self, request: web.Request, body: Body) -> web.StreamResponse:
        match request.path:
            case "/generate":
                return await self.generate(request, body)
            case "/health":
                return web.Response(status=200 if self.is_healthy else 503)
            case "/model_info":
                return web.json_response({"model_path": str(self.model_path), "weight_version": self.weight_version})
            case "/server_info":
                return web.json_response({"max_total_num_tokens": 4096})
            case "/v1/models":
                return web.json_response({"data": [{"max_model_len": 512}]})
            case "/update_weights_from_disk":
                self.weight_version = body["weight_version"]
                return web.json_response({"success": True})
        return web.json_response({})

    async def broken(self, request: web.Request, fault: str | int) -> web.StreamResponse:
        if fault == "garbage":
            return web.Response(text="{", content_type="application/json")
        if fault == "hang":
            await self.closing.wait()
            return web.Response(status=503)
        if fault == "cut":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        return web.Response(status=int(fault), text="the stub's fault")

    async def generate(self, request: web.Request, body: Body) -> web.StreamResponse:
        sampling = body["sampling_params"]
        bias = [int(token_id) for token_id in sampling.get("logit_bias", {})]
        if any(token_id >= VOCAB_SIZE for token_id in bias):
            return web.Response(status=400, text="no such token")
        if isinstance(body["input_ids"][0], list):  # the engine's check whether log-probs are after temperature
            return web.json_response([self.answer({**body, "input_ids": ids}) for ids in body["input_ids"]])
        fault = self.faults.pop(0) if self.faults and "rid" in body else None
        if callable(fault):
            fault = fault(body)  # type: ignore[assignment]
        if isinstance(fault, (str, int)):
            return await self.broken(request, fault)
        if self.gate is not None and "rid" in body:
            await self.gate.wait()
        return web.json_response(self.answer(body) if fault is None else fault)

    def answer(self, body: Body, count: int | None = None, finish: str = "length", version: str = "") -> Body:
        asked = body["sampling_params"]["max_new_tokens"]
        ids = expected_ids(body["input_ids"], asked if count is None else count)
        spans = [{"version": version or self.weight_version, "start": 0, "end": len(ids)}]
        rows = [[token_logprob(token_id), token_id, None] for token_id in ids]
        meta = {"finish_reason": {"type": finish}, "output_token_logprobs": rows, "weight_versions": spans}
        return {"output_ids": ids, "meta_info": meta}

    async def start(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        self.runner = web.AppRunner(app, shutdown_timeout=0)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

    async def stop(self) -> None:
        assert self.runner is not None
        self.closing.set()  # ends requests that hang
        await self.runner.cleanup()


@contextmanager
def stub_servers(model_path: Path, count: int = 1) -> Iterator[list[StubServer]]:
    """Yields servers that listen on loopback and generate until the block ends."""
    servers, thread = [StubServer(model_path) for _ in range(count)], EventLoopThread("stubs")
    for server in servers:
        thread.run(server.start())
    try:
        yield servers
    finally:
        for server in servers:
            thread.run(server.stop())
        thread.close()
