"""The engine against real servers; faults come from signals and from a proxy that breaks what passes through it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import torch
from aiohttp import web
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from megatron_oreal.engines.sglang import generate_api as sglang_answers
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.engines.sglang.generate_api import (
    MalformedAnswer,
    PartialResponse,
    backoff_seconds,
    read_chunk,
    versions_of_tokens,
)
from megatron_oreal.engines.sglang.server_checks import differ
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet, open_servers
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.engines.sglang.weights.disk import DiskTransport
from tests.support.paths import SGLANG_PYTHON

GREEDY = SamplingParams(temperature=0, max_new_tokens=24, stop_token_ids=(1,))
LONG = SamplingParams(max_new_tokens=480)  # a second, or part of it
PROMPTS = [[5, 9, 33], [40], [7, 7, 7, 7], [2, 3, 5, 8, 13, 21, 34, 55], [63, 0], [11, 12]]
END_TOKEN_ID = 1  # of the model


@pytest.fixture(scope="module")
def fleet(sglang_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFleet]:
    config = SglangConfig(python=SGLANG_PYTHON, num_servers=2, max_restarts=2, start_timeout_seconds=280)
    run_dir = tmp_path_factory.mktemp("engine")
    settings = ServerSettings(config, sglang_model, "float32", run_dir, "cpu", context_length=512)
    with open_servers(settings, print) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def model(sglang_model: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def greedy_ids(model: PreTrainedModel) -> list[list[int]]:
    """Of PROMPTS."""
    return [greedy(model, prompt, GREEDY) for prompt in PROMPTS]


@contextmanager
def opened(
    model_path: Path,
    endpoints: list[Endpoint],
    fleet: ServerFleet | None = None,
    health_timeout_seconds: float = 30,
    router: Endpoint | None = None,
    rank: int = 0,
    **settings: Any,
) -> Iterator[SglangEngine]:
    config = SglangConfig(**{"request_timeout_seconds": 1000} | settings)
    thread = EventLoopThread("test")
    transport = DiskTransport(thread, 60, model_path.parent / "pushed", model_path, is_main=True)
    engine = SglangEngine(
        config, model_path, endpoints, transport, thread, fleet, print, router, 1, health_timeout_seconds, rank
    )
    try:
        yield engine
    finally:
        engine.close()


def requests_of(num_samples: int) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, seed) for prompt in PROMPTS for seed in range(num_samples)]


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt_ids: list[int], params: SamplingParams) -> list[int]:
    ids = list(prompt_ids)
    while len(ids) - len(prompt_ids) < params.max_new_tokens:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in params.stop_token_ids:
            break
    return ids[len(prompt_ids) :]


@torch.inference_mode()
def logprobs(model: PreTrainedModel, prompt_ids: list[int], response_ids: list[int]) -> list[float]:
    """Of the untempered model."""
    logits = model(torch.tensor([prompt_ids + response_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response_ids)[:, None])[:, 0].tolist()


def assert_greedy(generations: list[Generation], model: PreTrainedModel) -> None:
    for generation, prompt in zip(generations, PROMPTS, strict=False):
        assert generation.response_ids.tolist() == greedy(model, prompt, GREEDY)


def assert_whole(generations: list[Generation], requests: list[GenerationRequest], model: PreTrainedModel) -> None:
    """One response of full length a request, in the requests' order."""
    assert len(generations) == len(requests)
    for request, generation in zip(requests, generations, strict=True):
        assert generation.finish_reason == "length"
        expected = logprobs(model, request.prompt_ids.tolist(), generation.response_ids.tolist())
        assert generation.model_logprobs.tolist() == pytest.approx(expected, abs=1e-4)


# Answers, without a server


def answer(token_ids: list[int], finish: str = "length", **meta: Any) -> dict[str, Any]:
    rows = [[-0.5, token_id, None] for token_id in token_ids]
    spans = [{"version": "default", "start": 0, "end": len(token_ids)}]
    known = {"finish_reason": {"type": finish}, "output_token_logprobs": rows, "weight_versions": spans}
    return {"output_ids": token_ids, "meta_info": known | meta}


def test_answers_are_read() -> None:
    assert read_chunk(answer([4, 5]), 2, "s").policy_versions.tolist() == [0, 0]
    assert read_chunk(answer([4], "stop"), 2, "s").finish_reason == "stop"
    nothing = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort"}, "weight_version": "3"}}
    assert read_chunk(nothing, 2, "s").token_ids.tolist() == []
    older = answer([4, 5], weight_versions=None, weight_version="7")
    assert read_chunk(older, 2, "s").policy_versions.tolist() == [7, 7]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"error": "?"}, "cannot be read"),
        ([], "cannot be read"),
        (answer([4, 5], output_token_logprobs=[[-0.5, 4, None]]), "log-probs of 1 others"),
        (answer([4, 5], output_token_logprobs=[[-0.5, 4, None], [-0.5, 6, None]]), "log-probs of 2 others"),
        (answer([4]), "ended a response at 1 tokens, 2 were asked for"),
        (answer([4, 5, 6]), "3 tokens, 2 were asked for"),
        (answer([4, 5.0]), "output_ids is not a list of integers"),
        (answer([4, None]), "output_ids is not a list of integers"),
        (answer([4, 2**31]), "an integer that is not a token id"),
        (answer([4, -1]), "an integer that is not a token id"),
        (answer([4, 5], output_token_logprobs=[[-0.5, 4, None], ["?", 5, None]]), "cannot be read"),
        (answer([4, 5], output_token_logprobs=[[-0.5, 4, None], [-0.5]]), "cannot be read"),
        (answer([4, 5], "tired"), "unknown finish reason 'tired'"),
        (answer([4, 5], weight_versions=[{"version": "1", "start": 0, "end": 1}]), "weight versions of 1 tokens"),
        (answer([4, 5], weight_versions=[{"version": "mine", "start": 0, "end": 2}]), "cannot be read"),
    ],
)
def test_malformed_answers_name_the_server(given: Any, reason: str) -> None:
    with pytest.raises(MalformedAnswer, match=f"http://server.*{reason}"):
        read_chunk(given, 2, "http://server")


@pytest.mark.parametrize("value", [None, float("inf"), float("nan")])
def test_logprobs_that_are_not_finite(value: float | None) -> None:
    with pytest.raises(FloatingPointError, match="http://server are not finite"):
        read_chunk(answer([4], output_token_logprobs=[[value, 4, None]]), 1, "http://server")


def test_versions_follow_each_other() -> None:
    spans = [{"version": "default", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}]
    assert versions_of_tokens(spans, 3).tolist() == [0, 0, 5]


def test_a_begun_response_is_joined() -> None:
    begun = Generation([4, 5], [-1.0, -2.0], [-1.0, -2.0], "abort", [3, 3])
    request = GenerationRequest([9], 2**64 + 5, begun)
    response = PartialResponse.of(request, SamplingParams(max_new_tokens=5, stop_token_ids=(1,)))
    body = response.body("id")
    assert body["input_ids"] == [9, 4, 5] and body["sampling_params"]["max_new_tokens"] == 3
    assert body["sampling_params"]["sampling_seed"] == 5
    added = answer([6, 1], "stop", weight_versions=[{"version": "4", "start": 0, "end": 2}])
    response.add(read_chunk(added, 3, "s"))
    expected = [-1.0, -2.0, -0.5, -0.5]
    assert response.generation() == Generation([4, 5, 6, 1], expected, expected, "stop", [3, 3, 4, 4])
    unknown = PartialResponse.of(request, SamplingParams(temperature=0.5, max_new_tokens=5))
    unknown.add(read_chunk(added, 3, "s"))
    assert not len(unknown.generation().rollout_logprobs) and unknown.generation().finish_reason == "abort"
    assert begun.response_ids.tolist() == [4, 5]


def test_tempered_logprobs_are_told_from_raw_ones() -> None:
    assert differ([-0.4, -1e-5], [-2.3, -0.1]) and not differ([-2.3, -0.1], [-2.301, -0.1])


def test_backoff_grows_and_is_spread() -> None:
    assert [backoff_seconds(number, 0) for number in (1, 2, 3, 9)] == [0.125, 0.25, 0.5, 4.0]
    assert len({backoff_seconds(1, index) for index in range(50)}) == 50


# Two healthy servers

needs_servers = pytest.mark.sglang


@needs_servers
@pytest.mark.parametrize("stop_token_ids", [(1,), (), (30, 31, 32, 33, 34, 35)])
def test_greedy_equals_transformers(
    fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel, stop_token_ids: tuple[int, ...]
) -> None:
    """Also where the model's end token is not among those that stop."""
    params = replace(GREEDY, stop_token_ids=stop_token_ids)
    with opened(sglang_model, fleet.endpoints) as engine:
        checked: RolloutEngine = engine
        generations = checked.generate(requests_of(1), params)
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        assert generation.response_ids.tolist() == greedy(model, prompt, params)
        expected = logprobs(model, prompt, generation.response_ids.tolist())
        assert generation.model_logprobs.tolist() == pytest.approx(expected, abs=1e-4)
        assert generation.rollout_logprobs.tolist() == [0.0] * len(expected)
        assert generation.finish_reason == ("stop" if generation.response_ids[-1] in stop_token_ids else "length")
        assert generation.policy_versions.tolist() == [0] * len(expected)


@needs_servers
def test_what_the_logprobs_are_of(fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel) -> None:
    with opened(sglang_model, fleet.endpoints) as engine:
        plain = engine.generate(requests_of(2), SamplingParams(max_new_tokens=16))
        tempered = engine.generate(requests_of(2), SamplingParams(temperature=0.6, top_p=0.9, max_new_tokens=16))
    assert_whole(plain, requests_of(2), model)
    assert_whole(tempered, requests_of(2), model)
    assert all(np.array_equal(generation.rollout_logprobs, generation.model_logprobs) for generation in plain)
    assert all(not len(generation.rollout_logprobs) for generation in tempered)


@needs_servers
def test_two_threads_share_the_servers(fleet: ServerFleet, sglang_model: Path, greedy_ids: list[list[int]]) -> None:
    """With room for fewer requests than there are."""
    found: dict[int, list[Generation]] = {}
    with opened(sglang_model, fleet.endpoints, max_concurrent_requests=2) as engine:

        def run(number: int) -> None:
            found[number] = engine.generate(requests_of(1) * 3, GREEDY)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        metrics = engine.flush_metrics()
        assert engine.flush_metrics()["rollout/num_requests"] == 0
    assert all([one.response_ids.tolist() for one in found[number]] == greedy_ids * 3 for number in range(2))
    assert metrics["rollout/num_requests"] == 36
    assert metrics["rollout/num_retries"] == metrics["rollout/num_server_failures"] == 0
    assert metrics["rollout/response_seconds_max"] >= metrics["rollout/response_seconds_median"] > 0
    assert metrics["rollout/server0_tokens_per_second"] > 0 and metrics["rollout/server1_tokens_per_second"] > 0


@needs_servers
def test_the_rest_is_given_up_and_continued(fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel) -> None:
    """Short requests end first; the long ones come back with what there is, and go on from there."""
    params = replace(GREEDY, max_new_tokens=400, stop_token_ids=())
    done = Generation([3] * 398, [0.0] * 398, [-1.0] * 398, "abort", [0] * 398)
    requests = [GenerationRequest([5], 0, done), *requests_of(1) * 2]
    told: list[int] = []

    def watch(index: int, generation: Generation) -> bool:
        assert threading.current_thread() is threading.main_thread() and generation.finish_reason == "length"
        told.append(index)
        return True

    with opened(sglang_model, fleet.endpoints, max_concurrent_requests=5) as engine:
        for _ in range(4):  # a busy machine may give up the others too late
            told.clear()
            first, *rest = engine.generate(requests, params, watch)
            metrics = engine.flush_metrics()
            if told == [0]:
                break
        assert told == [0] and len(first.response_ids) == 400
        assert {generation.finish_reason for generation in rest} == {"abort"}
        sizes = [len(generation.response_ids) for generation in rest]
        assert 0 < max(sizes) < 400 and 0 in sizes  # some were running, and some waited for room
        assert metrics["rollout/num_aborted"] == len(rest)
        begun = [replace(r, begun=g) for r, g in zip(requests[1:], rest, strict=True)]
        short = replace(params, max_new_tokens=max(sizes) + 5)
        for request, generation in zip(begun, engine.generate(begun, short), strict=True):
            assert generation.response_ids.tolist() == greedy(model, request.prompt_ids.tolist(), short)
            expected = logprobs(model, request.prompt_ids.tolist(), generation.response_ids.tolist())
            assert generation.model_logprobs.tolist() == pytest.approx(expected, abs=1e-4)
            assert len(generation.policy_versions) == len(generation.rollout_logprobs) == len(expected)


@needs_servers
def test_an_error_of_the_watch_ends_the_call(fleet: ServerFleet, sglang_model: Path) -> None:
    def watch(index: int, generation: Generation) -> bool:
        raise KeyError(index)

    with opened(sglang_model, fleet.endpoints) as engine:
        with pytest.raises(KeyError):
            engine.generate(requests_of(1), GREEDY, watch)
        assert len(engine.generate(requests_of(1), GREEDY)) == 6


@needs_servers
def test_a_closed_engine_lets_its_callers_go(fleet: ServerFleet, sglang_model: Path) -> None:
    found: list[str] = []

    def run() -> None:
        with pytest.raises(RuntimeError) as error:
            engine.generate(requests_of(4), LONG)
        found.append(str(error.value))

    with opened(sglang_model, fleet.endpoints) as engine:
        thread = threading.Thread(target=run)
        thread.start()
        wait_until(lambda: engine.pool.servers[0].num_running > 2)
    thread.join()
    assert found == ["the SGLang engine was closed while it generated"]


@needs_servers
def test_generation_waits_while_paused(fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel) -> None:
    found: list[Generation] = []
    requests = requests_of(1)
    with opened(sglang_model, fleet.endpoints, max_concurrent_requests=2) as engine:
        params = replace(LONG, max_new_tokens=200)
        thread = threading.Thread(target=lambda: found.extend(engine.generate(requests, params)))
        thread.start()
        wait_until(lambda: engine.pool.servers[0].num_running == 2)
        engine.thread.run(engine._hold())  # as before new weights
        assert len(engine.pool.living) == len(engine.pool.servers)
        thread.join(3)  # health checks go unanswered: nobody may be blamed for it
        assert thread.is_alive() and not found
        engine.thread.run(engine._resume())
        thread.join()
        assert engine.flush_metrics()["rollout/num_server_failures"] == 0
    assert_whole(found, requests, model)


@needs_servers
def test_bad_requests(fleet: ServerFleet, sglang_model: Path) -> None:
    with opened(sglang_model, fleet.endpoints) as engine:
        assert engine.generate([], GREEDY) == []
        with pytest.raises(ValueError, match="vocabulary of 64"):
            engine.generate([GenerationRequest([64], 0)], GREEDY)
        with pytest.raises(ValueError, match=r"rollout\.max_new_tokens: .* make 519, SGLang server http.* takes 518"):
            engine.generate([GenerationRequest([5] * 19, 0)], replace(GREEDY, max_new_tokens=500))
        longest = engine.generate([GenerationRequest([5] * 18, 0)], replace(LONG, max_new_tokens=500))
        assert len(longest[0].response_ids) == 500
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(requests_of(1), GREEDY)
    with opened(sglang_model, [], rank=1) as other_rank, pytest.raises(RuntimeError, match="not on the first rank"):
        other_rank.generate(requests_of(1), GREEDY)


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 120) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Faults on the way


@dataclass
class Proxy:
    """Passes requests on to a server, except where `fault` says otherwise."""

    target: Endpoint
    fault: Callable[[web.Request, int], str | None] = lambda _request, _number: None
    seen: list[str] = field(default_factory=list)  # paths
    url: str = ""

    @property
    def endpoint(self) -> Endpoint:
        return replace(self.target, url=self.url)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        number = self.seen.count(request.path)
        self.seen.append(request.path)
        fault = self.fault(request, number)
        if fault == "cut":
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if fault == "slow":
            await asyncio.sleep(3)
        elif fault == "garbage":
            return web.Response(text="{", content_type="application/json")
        elif fault is not None:
            return web.Response(status=int(fault), text="the proxy's fault")
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        async with aiohttp.ClientSession() as session:
            async with session.request(
                request.method, self.target.url + request.path, data=await request.read(), headers=headers
            ) as answer:
                body, kind = await answer.read(), answer.content_type
                return web.Response(status=answer.status, body=body, content_type=kind)

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.handle)
        runner = web.AppRunner(app, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner


@contextmanager
def proxy_to(endpoint: Endpoint) -> Iterator[Proxy]:
    proxy, thread = Proxy(endpoint), EventLoopThread("proxy")
    runner = thread.run(proxy.start())
    try:
        yield proxy
    finally:
        thread.run(runner.cleanup())
        thread.close()


def on_generate(*faults: str | None) -> Callable[[web.Request, int], str | None]:
    """The faults of the first requests after those of the start, one after the other."""
    left = list(faults)

    def fault(request: web.Request, _number: int) -> str | None:
        return left.pop(0) if request.path == "/generate" and request.method == "POST" and left else None

    return fault


@needs_servers
@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "slow", "garbage"])
def test_a_fault_that_passes(fleet: ServerFleet, sglang_model: Path, greedy_ids: list[list[int]], fault: str) -> None:
    """At one server of one: nothing is lost."""
    with proxy_to(fleet.endpoints[0]) as proxy, opened(sglang_model, [proxy.endpoint]) as engine:
        proxy.fault = on_generate(fault, None, fault, None, fault)
        generations = engine.generate(requests_of(1), GREEDY)
        metrics = engine.flush_metrics()
    assert [one.response_ids.tolist() for one in generations] == greedy_ids
    assert metrics["rollout/num_retries"] == (0 if fault == "slow" else 3)
    assert metrics["rollout/num_server_failures"] == 0


@needs_servers
def test_a_request_that_is_refused_is_not_repeated(fleet: ServerFleet, sglang_model: Path) -> None:
    with proxy_to(fleet.endpoints[0]) as proxy, opened(sglang_model, [proxy.endpoint]) as engine:
        proxy.fault = on_generate("400")
        with pytest.raises(ServerError, match=f"SGLang server {proxy.url}: POST /generate was answered 400"):
            engine.generate(requests_of(1)[:1], GREEDY)
        assert engine.flush_metrics()["rollout/num_requests"] == 1


@needs_servers
@pytest.mark.parametrize("fault", ["500", "cut"])
def test_a_server_that_fails_for_ever_is_given_up(
    fleet: ServerFleet, sglang_model: Path, greedy_ids: list[list[int]], fault: str
) -> None:
    """Its requests go to the other server."""
    with (
        proxy_to(fleet.endpoints[0]) as proxy,
        opened(sglang_model, [proxy.endpoint, fleet.endpoints[1]], max_failures=1) as engine,
    ):
        proxy.fault = lambda _request, _number: fault
        generations = engine.generate(requests_of(1) * 2, GREEDY)
        metrics = engine.flush_metrics()
        assert [server.state for server in engine.pool.servers] == ["dead", "living"]
        # The other one fails too.
        engine.pool.servers[1].client.endpoint = replace(fleet.endpoints[1], url="http://127.0.0.1:9")
        with pytest.raises(ServerError, match="no SGLang server is left to generate: the same command resumes the run"):
            engine.generate(requests_of(1), GREEDY)
    assert [one.response_ids.tolist() for one in generations] == greedy_ids * 2
    assert metrics["rollout/num_server_failures"] == 1 and metrics["rollout/num_retries"] >= 1


@needs_servers
def test_one_request_cannot_end_every_server(
    fleet: ServerFleet, sglang_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sglang_answers, "LONGEST_BACKOFF_SECONDS", 0.1)
    with proxy_to(fleet.endpoints[0]) as proxy, opened(sglang_model, [proxy.endpoint], max_failures=100) as engine:
        proxy.fault = on_generate(*["429"] * 100)
        with pytest.raises(ServerError, match=r"answered 429.*given up after 12 attempts"):
            engine.generate(requests_of(1)[:1], replace(GREEDY, max_new_tokens=1))


@needs_servers
def test_behind_a_router(fleet: ServerFleet, sglang_model: Path, greedy_ids: list[list[int]]) -> None:
    """The router gets what is new, the servers what has failed, and what was given up."""
    with (
        proxy_to(fleet.endpoints[0]) as proxy,
        opened(sglang_model, fleet.endpoints, router=proxy.endpoint) as engine,
    ):
        generations = engine.generate(requests_of(1), GREEDY)
        assert proxy.seen == ["/generate"] * len(PROMPTS)
        proxy.fault = on_generate("503", "cut")
        again = engine.generate(requests_of(1), GREEDY)
        metrics = engine.flush_metrics()
        done = Generation([3], [0.0], [-1.0], "length", [0])
        mixed = [GenerationRequest([5], 0, done), *requests_of(1)]
        given_up = engine.generate(mixed, replace(GREEDY, max_new_tokens=1), lambda _index, _generation: True)
    assert (
        [one.response_ids.tolist() for one in generations] == [one.response_ids.tolist() for one in again] == greedy_ids
    )
    assert metrics["rollout/num_retries"] == 2 and metrics["rollout/num_server_failures"] == 0
    assert len(given_up) == 7


# Servers that cannot be used


@needs_servers
def test_servers_that_cannot_be_used(fleet: ServerFleet, sglang_model: Path, untied_path: Path) -> None:
    good = fleet.endpoints[0]

    def refused(endpoint: Endpoint, model_path: Path = sglang_model) -> str:
        with pytest.raises(ValueError) as error, opened(model_path, [good, endpoint]):
            pass
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "refuses the api_key" in refused(replace(good, api_key="wrong"))
    assert "refuses the admin_key" in refused(replace(good, admin_key="wrong"))
    assert "is it running, and is its address right?" in refused(replace(good, url="http://127.0.0.1:9"))
    assert "has another model (vocab_size 64, model.path has 24): let it serve" in refused(good, untied_path)
    with proxy_to(good) as proxy:
        proxy.fault = lambda request, _number: "404" if request.path == "/pause_generation" else None
        message = refused(proxy.endpoint)
    assert "/pause_generation was answered 404" in message and "install sglang>=" in message


# Weights


@needs_servers
def test_tokens_know_their_weights(fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel) -> None:
    """Weights that arrive while a response is under way; and a server that has missed them gets nothing."""
    stream = list(model.state_dict().items())
    requests = requests_of(1)
    found: list[Generation] = []
    with opened(sglang_model, fleet.endpoints, max_concurrent_requests=4) as engine:
        engine.update_weights(stream, version=3)
        assert engine.version == 3
        thread = threading.Thread(target=lambda: found.extend(engine.generate(requests, LONG)))
        thread.start()
        wait_until(lambda: sum(server.num_running for server in engine.pool.servers) == 6)
        time.sleep(0.3)
        engine.update_weights(stream, version=4)
        thread.join()
        assert_whole(found, requests, model)
        for generation in found:
            assert sorted(generation.policy_versions) == generation.policy_versions.tolist()
            assert set(generation.policy_versions) <= {3, 4} and 4 in generation.policy_versions
        assert any(3 in generation.policy_versions for generation in found)

        engine.pool.servers[1].client.endpoint = replace(fleet.endpoints[1], url="http://127.0.0.1:9")
        engine.update_weights(stream, version=5)  # the others get them
        assert [server.state for server in engine.pool.servers] == ["living", "dead"]
        assert {*engine.generate(requests[:1], GREEDY)[0].policy_versions} == {5}
        engine.pool.servers[1].client.endpoint = fleet.endpoints[1]
        engine.update_weights(stream, version=6)
        assert [server.state for server in engine.pool.servers] == ["living", "living"]
        run_id = engine.pusher.run_id
        engine.resume_memory(["weights", "kv_cache"])  # nothing was released: nothing is asked
        engine.thread.run(engine._control_all("/pause_generation", {"mode": "retract"}))

    with opened(sglang_model, fleet.endpoints) as engine:  # what a trainer that was killed has paused goes on
        engine.version, engine.pusher.run_id, engine.pool.has_new_weights = 6, run_id, True  # the same run
        assert_greedy(engine.generate(requests[:2], GREEDY), model)
        with pytest.raises(ValueError, match=r"has weights of version 6 from a training run, not those of model.path"):
            engine.check_unchanged()


# Servers that hang or die, in the middle of a rollout: the last tests of this file


@needs_servers
def test_a_server_that_hangs(fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel) -> None:
    """SIGSTOP: health checks find it."""
    requests = requests_of(8)
    group = os.getpgid(fleet.pid(fleet.endpoints[1]))
    with opened(sglang_model, fleet.endpoints, health_timeout_seconds=4) as engine:
        engine.update_weights(list(model.state_dict().items()), version=1)  # the servers may have another run's
        stopper = threading.Thread(target=lambda: signal_when_busy(engine, 1, group, signal.SIGSTOP))
        stopper.start()
        try:
            generations = engine.generate(requests, LONG)
        finally:
            stopper.join()
            os.killpg(group, signal.SIGCONT)
        metrics = engine.flush_metrics()
        assert engine.pool.servers[1].state == "dead"
    assert_whole(generations, requests, model)
    assert metrics["rollout/num_server_failures"] == 1 and metrics["rollout/num_retries"] >= 1


@needs_servers
@pytest.mark.timeout(600)  # a server starts again meanwhile
def test_a_server_that_is_killed(fleet: ServerFleet, sglang_model: Path, model: PreTrainedModel) -> None:
    """SIGKILL. It is started again, waits for weights, and then works; the restarts have an end."""
    requests = requests_of(8)
    told: list[int] = []

    def watch(index: int, _generation: Generation) -> bool:
        told.append(index)
        return False

    stream = list(model.state_dict().items())
    with opened(sglang_model, fleet.endpoints, fleet) as engine:
        engine.update_weights(stream, version=1)
        group = os.getpgid(fleet.pid(fleet.endpoints[0]))
        killer = threading.Thread(target=lambda: signal_when_busy(engine, 0, group, signal.SIGKILL))
        killer.start()
        generations = engine.generate(requests, LONG, watch)
        killer.join()
        assert_whole(generations, requests, model)
        assert sorted(told) == list(range(len(requests)))
        wait_until(lambda: engine.pool.servers[0].state == "stale", 280)
        metrics = engine.flush_metrics()
        assert metrics["rollout/num_server_failures"] == metrics["rollout/num_server_restarts"] == 1
        assert metrics["rollout/num_retries"] >= 1
        engine.update_weights(stream, version=2)
        assert [server.state for server in engine.pool.servers] == ["living", "living"]
        again = engine.generate(requests, replace(LONG, max_new_tokens=8))
        assert {version for generation in again for version in generation.policy_versions} == {2}

        kill_all(fleet)  # one may be started again, and the update waits for it
        wait_until(lambda: not engine.pool.living)
        engine.update_weights(stream, version=3)
        assert sorted(server.state for server in engine.pool.servers) == ["dead", "living"]
        assert {*engine.generate(requests[:1], GREEDY)[0].policy_versions} == {3}

        kill_all(fleet)  # the budget is spent
        with pytest.raises(ServerError, match="no SGLang server is left to generate: the same command resumes"):
            engine.generate(requests, LONG)
        wait_until(lambda: {server.state for server in engine.pool.servers} == {"dead"})
        with pytest.raises(
            ServerError, match=r"weights of version 4: no SGLang server is left.*max_restarts are spent"
        ):
            engine.update_weights(stream, version=4)


def kill_all(fleet: ServerFleet) -> None:
    for endpoint in list(fleet.endpoints):
        os.killpg(os.getpgid(fleet.pid(endpoint)), signal.SIGKILL)


def signal_when_busy(engine: SglangEngine, index: int, group: int, number: int) -> None:
    wait_until(lambda: engine.pool.servers[index].num_running > 2)
    os.killpg(group, number)
