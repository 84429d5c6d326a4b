"""Measures the trainer's cost of SGLang rollouts: `SglangEngine` beside a plain load generator, on the same servers.

    python tools/bench/bench_rollout.py --rounds 7   # starts a real server (tools/setup_sglang.sh) on the CPU
    python tools/bench/bench_rollout.py --endpoints FILE --model DIR   # servers that `megatron-oreal serve` has started

The load generator uses aiohttp only: it posts the same requests with the same concurrency, parses the answers and
counts tokens. First, both use a server that immediately returns a prepared response, so that all time is overhead. Then
both alternate at the real servers, in an order that changes each round, so that a busy machine slows both.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import aiohttp
import click
import torch
from aiohttp import web
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a script's module path lacks the checkout's root

from examples.tiny_model import tiny_config, write_random_model
from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.engine import GenerationRequest, SamplingParams
from megatron_oreal.engines.sglang.client import EventLoopThread
from megatron_oreal.engines.sglang.endpoints import Endpoint, read_endpoints
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.engines.sglang.generate_api import PartialResponse
from megatron_oreal.engines.sglang.servers.fleet import open_servers
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.engines.sglang.weights.disk import DiskTransport

PROMPT_TOKENS = 32
VOCAB_SIZE = 1024
Rival = Callable[[], int]  # returns the number of generated tokens


def make_model(path: Path, max_tokens: int) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": max_tokens}
    write_random_model(path, tiny_config(vocab_size=VOCAB_SIZE, pad_token_id=0, eos_token_id=1, **shape), seed=0)


def serve_at_once(port: Connection, num_tokens: int, num_most: int) -> None:
    """Runs a server in a separate process that answers as an idle SGLang does; every response is the same."""

    def answer(size: int) -> dict[str, object]:
        token_ids = [(7 * place) % VOCAB_SIZE for place in range(size)]
        meta = {
            "finish_reason": {"type": "length", "length": size},
            "output_token_logprobs": [
                [-1.2345678806304932 - 0.001 * token_id, token_id, None] for token_id in token_ids
            ],
            "weight_versions": [{"version": "default", "start": 0, "end": size}],
        }
        return {"output_ids": token_ids, "meta_info": meta}

    prepared = json.dumps(answer(num_tokens)).encode()

    async def generate(request: web.Request) -> web.Response:
        body = await request.read()
        if b'"max_new_tokens": 1,' not in body and b'"max_new_tokens": 1}' not in body:
            return web.Response(body=prepared, content_type="application/json")
        asked = json.loads(body)  # one of the checks at the engine's start
        if str(VOCAB_SIZE) in asked["sampling_params"].get("logit_bias", {}):
            return web.Response(status=400, text="no such token")
        one = answer(1)
        return web.json_response([one for _ in asked["input_ids"]] if isinstance(asked["input_ids"][0], list) else one)

    async def facts(request: web.Request) -> web.Response:
        known = {"model_type": "qwen2", "model_path": "", "max_total_num_tokens": num_most}
        return web.json_response(known | {"data": [{"max_model_len": num_most}]})

    async def nothing(request: web.Request) -> web.Response:
        return web.json_response({})

    async def run() -> None:
        app = web.Application()
        app.router.add_post("/generate", generate)
        for path in ("/model_info", "/server_info", "/v1/models", "/health"):
            app.router.add_get(path, facts)
        for path in ("/abort_request", "/pause_generation", "/continue_generation"):
            app.router.add_post(path, nothing)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


@contextmanager
def server_at_once(num_tokens: int) -> Iterator[Endpoint]:
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve_at_once, args=(theirs, num_tokens, 2 * num_tokens + 1000), daemon=True
    )
    server.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{ours.recv()}", "", "")
    finally:
        server.kill()
        server.join()


@contextmanager
def open_engine(model_path: Path, endpoints: Sequence[Endpoint], concurrency: int) -> Iterator[SglangEngine]:
    thread = EventLoopThread("bench")
    transport = DiskTransport(thread, 60, model_path / "unused", model_path, is_main=False)
    config = SglangConfig(max_concurrent_requests=concurrency)
    engine = SglangEngine(config, model_path, endpoints, transport, thread, notify=click.echo)
    try:
        yield engine
    finally:
        engine.close()


def engine_rival(engine: SglangEngine, requests: list[GenerationRequest], params: SamplingParams) -> Rival:
    def run() -> int:
        return sum(len(generation.response_ids) for generation in engine.generate(requests, params))

    return run


def bare_rival(
    endpoints: Sequence[Endpoint], requests: list[GenerationRequest], params: SamplingParams, concurrency: int
) -> Rival:
    async def gather() -> int:
        connector = aiohttp.TCPConnector(limit=concurrency * len(endpoints))
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(3600), connector=connector) as session:

            async def one(index: int, request: GenerationRequest) -> int:
                endpoint = endpoints[index % len(endpoints)]
                headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
                body = PartialResponse.of(request, params).body(uuid.uuid4().hex)
                async with session.post(f"{endpoint.url}/generate", json=body, headers=headers) as answer:
                    return len((await answer.json())["output_ids"])

            return sum(await asyncio.gather(*(one(index, request) for index, request in enumerate(requests))))

    return lambda: asyncio.run(gather())


@dataclass(slots=True)
class Measured:
    tokens_per_second: list[float]
    requests_per_second: list[float]
    cpu_milliseconds: list[float]  # of this process, per request


def measure(rivals: dict[str, Rival], num_requests: int, rounds: int) -> dict[str, Measured]:
    """Measures all rounds after one warm-up round."""
    measured = {name: Measured([], [], []) for name in rivals}
    for number in range(rounds + 1):
        for name in sorted(rivals, reverse=number % 2 == 1):
            cpu, start = time.process_time(), time.perf_counter()
            num_tokens = rivals[name]()
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
            if number:
                measured[name].tokens_per_second.append(num_tokens / seconds)
                measured[name].requests_per_second.append(num_requests / seconds)
                measured[name].cpu_milliseconds.append(1000 * cpu_seconds / num_requests)
    return measured


def report(title: str, measured: dict[str, Measured]) -> None:
    click.echo(title)
    for name, one in measured.items():
        spread = f"[{min(one.tokens_per_second):.0f}, {max(one.tokens_per_second):.0f}]"
        click.echo(
            f"  {name:8s} {statistics.median(one.requests_per_second):8.0f} requests/s"
            f" {statistics.median(one.tokens_per_second):10.0f} tokens/s {spread:18s}"
            f" {statistics.median(one.cpu_milliseconds):6.2f} ms of CPU a request"
        )
    pairs = zip(measured["engine"].tokens_per_second, measured["bare"].tokens_per_second, strict=True)
    ratios = [engine / bare for engine, bare in pairs]
    medians = [statistics.median(measured[name].tokens_per_second) for name in ("engine", "bare")]
    click.echo(
        f"  engine / bare: {medians[0] / medians[1]:.3f} of the medians; by round {statistics.median(ratios):.3f} "
        f"[{min(ratios):.3f}, {max(ratios):.3f}]"
    )


@click.command()
@click.option("--requests", "num_requests", default=128, show_default=True)
@click.option("--max-new-tokens", default=64, show_default=True)
@click.option("--concurrency", default=256, show_default=True, help="Requests under way at once, a server.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--instant-requests", default=1000, show_default=True, help="To the server that answers at once.")
@click.option("--instant-tokens", default=64, show_default=True, help="Of each of its responses.")
@click.option("--python", default=".venv-sglang/bin/python", show_default=True, type=Path, help="That has SGLang.")
@click.option("--endpoints", "endpoints_file", type=Path, help="Of servers that run, instead of one of its own.")
@click.option("--model", "model_path", type=Path, help="What they serve.")
def main(
    num_requests: int,
    max_new_tokens: int,
    concurrency: int,
    rounds: int,
    instant_requests: int,
    instant_tokens: int,
    python: Path,
    endpoints_file: Path | None,
    model_path: Path | None,
) -> None:
    """Prints requests and tokens a second of the engine and the load generator, and their ratio."""
    if (endpoints_file is None) != (model_path is None):
        raise click.UsageError("--endpoints and --model belong together")
    logging.disable_progress_bar()
    torch.manual_seed(0)

    def requests_of(number: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(row, seed)
            for seed, row in enumerate(torch.randint(3, 900, (number, PROMPT_TOKENS)).tolist())
        ]

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        small = folder / "model"
        make_model(small, max_new_tokens + 64)
        with server_at_once(instant_tokens) as endpoint, open_engine(small, [endpoint], concurrency) as engine:
            params, requests = SamplingParams(max_new_tokens=instant_tokens), requests_of(instant_requests)
            rivals = {
                "engine": engine_rival(engine, requests, params),
                "bare": bare_rival([endpoint], requests, params, concurrency),
            }
            title = f"a server that answers at once: {instant_requests} requests of {instant_tokens} tokens"
            report(title, measure(rivals, instant_requests, rounds))
        if endpoints_file is not None and model_path is not None:
            endpoints, path = read_endpoints(endpoints_file), model_path
        else:
            config, path = SglangConfig(python=python), small
            context = PROMPT_TOKENS + max_new_tokens
            settings = ServerSettings(config, small, "float32", folder / "run", "cpu", context)
            fleet = open_servers(settings, click.echo)
            endpoints = stack.enter_context(fleet).endpoints
        engine = stack.enter_context(open_engine(path, endpoints, concurrency))
        params, requests = SamplingParams(max_new_tokens=max_new_tokens), requests_of(num_requests)
        rivals = {
            "engine": engine_rival(engine, requests, params),
            "bare": bare_rival(endpoints, requests, params, concurrency),
        }
        title = f"{len(endpoints)} SGLang server(s): {num_requests} requests of {max_new_tokens} tokens"
        report(title, measure(rivals, num_requests, rounds))


if __name__ == "__main__":
    main()
