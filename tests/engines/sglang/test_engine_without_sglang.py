"""The engine against stub servers: which server is asked, what is asked again, and whose weights an answer has."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams
from megatron_oreal.engines.sglang import generate_api
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, ServerRefusal
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.engine import MAX_ATTEMPTS, SglangEngine
from megatron_oreal.engines.sglang.generate_api import MalformedAnswer, may_ask_again
from megatron_oreal.engines.sglang.server_pool import ServerPool
from megatron_oreal.engines.sglang.weight_labels import label_of, version_of
from megatron_oreal.engines.sglang.weights.disk import DiskTransport
from megatron_oreal.rollout.group_broadcast import in_thread
from tests.support.stub_server import Body, StubServer, expected_ids, stub_servers, token_logprob

PARAMS = SamplingParams(max_new_tokens=6)
REQUESTS = [GenerationRequest([5, 9 + number], number) for number in range(4)]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate_api, "FIRST_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(generate_api, "LONGEST_BACKOFF_SECONDS", 0.01)


class FakeFleet:
    """Says whether servers live and starts others in their place, without a process."""

    def __init__(self, spare: list[Endpoint]) -> None:
        self.spare, self.ended = spare, set[Endpoint]()
        self.elsewhere: list[Endpoint] = []  # what the file of servers that others start names by now
        self.may_restart = threading.Event()
        self.may_restart.set()

    def is_alive(self, endpoint: Endpoint) -> bool:
        return endpoint not in self.ended

    def candidates(self, endpoint: Endpoint) -> list[Endpoint]:
        return [endpoint, *self.elsewhere] if self.elsewhere else []

    def restart(self, endpoint: Endpoint) -> Endpoint:
        assert self.may_restart.wait(20)
        if not self.spare:
            raise ServerError("max_restarts are spent")
        return self.spare.pop(0)

    def log_tail(self, endpoint: Endpoint, num_lines: int = 5) -> str:
        return "its last line"


@contextmanager
def opened(
    servers: list[StubServer], fleet: FakeFleet | None = None, router: StubServer | None = None, **settings: Any
) -> Iterator[SglangEngine]:
    config = SglangConfig(**{"request_timeout_seconds": 1000} | settings)
    thread, model_path = EventLoopThread("test"), servers[0].model_path
    transport = DiskTransport(thread, 60, model_path.parent / "pushed", model_path, is_main=True)
    endpoints = [server.endpoint for server in servers]
    told: list[str] = []
    routed = router.endpoint if router is not None else None
    engine = SglangEngine(config, model_path, endpoints, transport, thread, fleet, told.append, routed, 0.05, 0.3)
    for server in (*servers, *([router] if router is not None else [])):
        server.seen.clear()
    try:
        yield engine
    finally:
        engine.close()


def states(engine: SglangEngine) -> list[str]:
    return [server.state for server in engine.pool.servers]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def assert_whole(generations: list[Generation], version: int = 0, count: int = 6) -> None:
    for request, generation in zip(REQUESTS, generations, strict=False):
        ids = expected_ids(request.prompt_ids.tolist(), count)
        assert generation.response_ids.tolist() == ids
        assert generation.model_logprobs.tolist() == [token_logprob(token_id) for token_id in ids]
        assert generation.policy_versions.tolist() == [version] * count
        assert generation.finish_reason == "length"


@pytest.fixture(scope="module")
def stream(sglang_model: Path) -> list[tuple[str, Any]]:
    return list(AutoModelForCausalLM.from_pretrained(sglang_model).state_dict().items())


def test_what_a_server_is_asked(sglang_model: Path) -> None:
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        generations = engine.generate(REQUESTS, replace(PARAMS, temperature=1.0, top_p=0.9, stop_token_ids=(1,)))
        bodies = sorted(servers[0].asked("/generate"), key=lambda body: body["rid"])
        metrics = engine.flush_metrics()
    assert_whole(generations)
    assert [body["input_ids"] for body in bodies] == [request.prompt_ids.tolist() for request in REQUESTS]
    assert [body["sampling_params"]["sampling_seed"] for body in bodies] == [0, 1, 2, 3]
    assert {body["sampling_params"]["top_p"] for body in bodies} == {0.9}
    assert len({len(body["rid"]) for body in bodies}) == 1  # no id begins another
    assert metrics["rollout/num_requests"] == 4 and metrics["rollout/num_retries"] == 0


@pytest.mark.parametrize("fault", [500, 503, 429, 408, "cut", "garbage"])
def test_what_passes_is_asked_again(sglang_model: Path, fault: str | int) -> None:
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        servers[0].faults = [fault, None, fault]
        generations = engine.generate(REQUESTS, PARAMS)
        metrics = engine.flush_metrics()
    assert_whole(generations)
    assert metrics["rollout/num_retries"] == 2 and metrics["rollout/num_server_failures"] == 0


def malformed(change: str) -> Callable[[Body], Body]:
    def fault(body: Body) -> Body:
        ids = expected_ids(body["input_ids"], 6)
        meta = {
            "finish_reason": {"type": "tired" if change == "finish" else "length"},
            "output_token_logprobs": [[-0.5, token_id, None] for token_id in ids[change == "missing" :]],
            "weight_versions": [{"version": "default", "start": 0, "end": 6}],
        }
        return {"output_ids": [-1, *ids[1:]] if change == "id" else ids, "meta_info": meta}

    return fault


@pytest.mark.parametrize("fault", [400, 401, 404, malformed("finish"), malformed("missing"), malformed("id")])
def test_what_would_come_again_is_not_asked_again(sglang_model: Path, fault: Any) -> None:
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        servers[0].faults = [fault]
        with pytest.raises(ServerError, match=f"SGLang server {servers[0].url}"):
            engine.generate(REQUESTS[:1], PARAMS)
        assert len(servers[0].asked("/generate")) == 1
        assert states(engine) == ["living"]
        assert_whole(engine.generate(REQUESTS, PARAMS))


def test_which_errors_may_be_asked_again() -> None:
    may = {status: may_ask_again(ServerRefusal("", status)) for status in (400, 401, 404, 408, 422, 429, 499, 500, 503)}
    assert [status for status, again in may.items() if again] == [408, 429, 500, 503]
    assert may_ask_again(ServerError("no connection")) and not may_ask_again(MalformedAnswer("?"))


def test_answers_of_older_weights_are_not_taken(sglang_model: Path, stream: Any) -> None:
    """A server with older weights is not believed, even when it is the only one that answers."""
    with stub_servers(sglang_model, 2) as servers, opened(servers, max_failures=1) as engine:
        engine.update_weights(stream, version=3)
        assert {server.weight_version for server in servers} == {label_of(engine.pusher.run_id, 3)}
        servers[0].weight_version = "2"
        generations = engine.generate(REQUESTS, PARAMS)
        assert states(engine) == ["dead", "living"]
        assert_whole(generations, version=3)
        servers[1].weight_version = "2"
        with pytest.raises(ServerError, match=r"has weights older than version 3"):
            engine.generate(REQUESTS, PARAMS)
        servers[1].weight_version = "default"
    with stub_servers(sglang_model) as servers, opened(servers, max_failures=100) as engine:
        engine.update_weights(stream, version=1)
        old, new = (label_of(engine.pusher.run_id, version) for version in (0, 1))
        mixed = [{"version": old, "start": 0, "end": 1}, {"version": new, "start": 1, "end": 6}]

        def one_old_token(body: Body) -> Body:
            answer = servers[0].answer(body)
            answer["meta_info"]["weight_versions"] = mixed
            return answer

        servers[0].faults = [one_old_token]
        assert_whole(engine.generate(REQUESTS[:1], PARAMS), version=1)
        assert len(servers[0].asked("/generate")) == 2


def test_a_server_that_fails_is_left_for_the_other(sglang_model: Path) -> None:
    with stub_servers(sglang_model, 2) as servers, opened(servers, max_failures=2) as engine:
        servers[0].faults_of["/generate"] = 500
        assert_whole(engine.generate(REQUESTS, PARAMS))
        for _ in range(3):
            assert_whole(engine.generate(REQUESTS, PARAMS))
        assert states(engine) == ["dead", "living"]
        metrics = engine.flush_metrics()
        assert metrics["rollout/num_server_failures"] == 1
        num_asked = len(servers[0].asked("/generate"))
        engine.generate(REQUESTS, PARAMS)
        assert len(servers[0].asked("/generate")) == num_asked
        servers[1].faults_of["/generate"] = "cut"
        with pytest.raises(ServerError, match="no SGLang server is left to generate: the same command resumes the run"):
            engine.generate(REQUESTS, PARAMS)


def test_a_busy_server_is_not_dead_but_one_request_has_an_end(sglang_model: Path) -> None:
    with stub_servers(sglang_model) as servers, opened(servers, max_failures=1) as engine:
        servers[0].faults_of["/generate"] = 429
        with pytest.raises(ServerError, match=f"answered 429.*given up after {MAX_ATTEMPTS} attempts"):
            engine.generate(REQUESTS[:1], PARAMS)
        assert states(engine) == ["living"] and len(servers[0].asked("/generate")) == MAX_ATTEMPTS


def test_answers_without_a_token_have_an_end(sglang_model: Path) -> None:
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        servers[0].faults = [lambda body: servers[0].answer(body, 0, "abort")] * (MAX_ATTEMPTS + 1)
        with pytest.raises(ServerError, match=f"has answered {MAX_ATTEMPTS} times without a token"):
            engine.generate(REQUESTS[:1], PARAMS)
        engine.flush_metrics()
        servers[0].faults = [lambda body: servers[0].answer(body, 2, "abort")] * 2
        (generation,) = engine.generate(REQUESTS[:1], PARAMS)
        assert generation.response_ids.tolist() == expected_ids([5, 9], 6)
        assert [len(body["input_ids"]) for body in servers[0].asked("/generate")[-3:]] == [2, 4, 6]
        assert engine.flush_metrics()["rollout/num_continued"] == 2


async def acquired(pool: ServerPool, count: int, avoid: int | None = None) -> list[int]:
    """The indices of the servers that so many callers get, one after the other, before any is given back."""
    servers = [await pool.acquire(None if avoid is None else pool.servers[avoid]) for _ in range(count)]
    for server in servers:
        pool.release(server)
    return [server.index for server in servers]


def test_the_least_busy_server_is_chosen(sglang_model: Path) -> None:
    with stub_servers(sglang_model, 3) as servers, opened(servers, max_concurrent_requests=2) as engine:
        assert engine.thread.run(acquired(engine.pool, 5)) == [0, 1, 2, 0, 1]
        assert engine.thread.run(acquired(engine.pool, 5, avoid=0)) == [1, 2, 1, 2, 0]  # only where there is no other
        engine.thread.run(marked_dead(engine.pool))
        assert engine.thread.run(acquired(engine.pool, 3)) == [1, 2, 1]


def test_servers_share_the_requests(sglang_model: Path) -> None:
    """The least busy one comes first, and none has more than max_concurrent_requests."""
    with stub_servers(sglang_model, 2) as servers, opened(servers, max_concurrent_requests=3) as engine:
        for server in servers:
            server.gate = asyncio.Event()
        found: list[Generation] = []
        thread = threading.Thread(target=lambda: found.extend(engine.generate(REQUESTS * 2, PARAMS)))
        thread.start()
        wait_until(lambda: [len(server.asked("/generate")) for server in servers] == [3, 3])
        time.sleep(0.1)
        assert [server.num_running for server in engine.pool.servers] == [3, 3]
        for server in servers:
            assert server.gate is not None
            server.gate.set()
            server.gate = None
        release(engine, servers)
        thread.join(30)
        assert_whole(found[:4])
        assert_whole(found[4:])
        assert [server.num_running for server in engine.pool.servers] == [0, 0]


def release(engine: SglangEngine, servers: list[StubServer]) -> None:
    """Wakes the stubs' loop: an event that another thread sets is seen at the loop's next turn."""
    for server in servers:
        engine.thread.run(engine.pool.servers[0].client.get("/health", 5))
        assert server.url


def test_a_server_that_hangs_is_found_by_its_health(sglang_model: Path) -> None:
    with stub_servers(sglang_model, 2) as servers, opened(servers, max_failures=2) as engine:
        servers[0].faults_of |= {"/generate": "hang", "/health": "hang"}
        assert_whole(engine.generate(REQUESTS, PARAMS))
        assert states(engine) == ["dead", "living"]
        assert len(servers[0].asked("/health")) >= 2
        assert not servers[1].asked("/health") or servers[1].is_healthy
    with stub_servers(sglang_model) as servers, opened(servers, max_failures=1) as engine:
        servers[0].faults_of["/health"] = 503
        time.sleep(0.3)
        assert states(engine) == ["living"] and not servers[0].asked("/health")  # nobody asks an idle one


def test_a_dead_server_is_replaced_and_waits_for_weights(sglang_model: Path, stream: Any) -> None:
    with stub_servers(sglang_model, 3) as (first, second, spare):
        fleet = FakeFleet([spare.endpoint])
        with opened([first, second], fleet) as engine:
            engine.update_weights(stream, version=1)
            fleet.ended.add(first.endpoint)
            wait_until(lambda: states(engine)[0] == "stale")
            assert engine.pool.servers[0].client.endpoint == spare.endpoint
            assert_whole(engine.generate(REQUESTS, PARAMS), version=1)
            assert not spare.asked("/generate")
            engine.update_weights(stream, version=2)
            assert states(engine) == ["living", "living"]
            assert [version_of(each.weight_version) for each in (spare, second, first)] == [2, 2, 1]
            assert_whole(engine.generate(REQUESTS, PARAMS), version=2)
            assert spare.asked("/generate")
            metrics = engine.flush_metrics()
            assert metrics["rollout/num_server_failures"] == metrics["rollout/num_server_restarts"] == 1
            fleet.ended |= {second.endpoint, spare.endpoint}
            wait_until(lambda: set(states(engine)) == {"dead"})
            with pytest.raises(ServerError, match=r"max_restarts are spent.*\nthe log of .* ends:\nits last line"):
                engine.generate(REQUESTS, PARAMS)
            second.faults_of["/model_info"] = spare.faults_of["/model_info"] = "cut"
            with pytest.raises(ServerError, match="weights of version 3: no SGLang server is left"):
                engine.update_weights(stream, version=3)


def test_a_server_with_the_first_weights_goes_on_at_once(sglang_model: Path) -> None:
    """Before any weights have arrived, a server that was started again has the right ones; requests wait for it."""
    with stub_servers(sglang_model, 2) as (first, spare):
        fleet = FakeFleet([spare.endpoint])
        fleet.may_restart.clear()
        with opened([first], fleet) as engine:
            fleet.ended.add(first.endpoint)
            wait_until(lambda: states(engine) == ["restarting"])
            found: list[Generation] = []
            thread = threading.Thread(target=lambda: found.extend(engine.generate(REQUESTS, PARAMS)))
            thread.start()
            time.sleep(0.1)
            assert not found
            fleet.may_restart.set()
            thread.join(30)
            assert_whole(found)
            assert states(engine) == ["living"]


def test_a_server_that_starts_while_the_first_weights_are_pushed_waits_for_the_next(
    sglang_model: Path, stream: Any
) -> None:
    """It comes up with the weights on disk, which are the right ones until the push is over."""
    with stub_servers(sglang_model, 3) as (first, second, spare):
        fleet = FakeFleet([spare.endpoint])
        fleet.may_restart.clear()
        with opened([first, second], fleet) as engine:
            fleet.ended.add(first.endpoint)
            wait_until(lambda: states(engine)[0] == "restarting")
            answered = second.answered

            async def after_the_start(request: Any, body: Body) -> Any:
                if request.path == "/update_weights_from_disk":
                    fleet.may_restart.set()
                    while states(engine)[0] != "living":
                        await asyncio.sleep(0.005)
                return await answered(request, body)

            second.answered = after_the_start  # type: ignore[method-assign]
            engine.update_weights(stream, version=1)
            assert states(engine) == ["stale", "living"]
            assert_whole(engine.generate(REQUESTS, PARAMS), version=1)
            assert not spare.asked("/generate")
            second.answered = answered  # type: ignore[method-assign]
            engine.update_weights(stream, version=2)
            assert states(engine) == ["living", "living"] and version_of(spare.weight_version) == 2


def test_a_server_that_refuses_weights_is_left_out(sglang_model: Path, stream: Any) -> None:
    with stub_servers(sglang_model, 2) as servers, opened(servers) as engine:
        servers[0].faults_of["/update_weights_from_disk"] = 500
        engine.update_weights(stream, version=1)
        assert states(engine) == ["dead", "living"] and engine.version == 1
        assert_whole(engine.generate(REQUESTS, PARAMS), version=1)
        assert not servers[0].asked("/generate")
        del servers[0].faults_of["/update_weights_from_disk"]
        engine.update_weights(stream, version=2)  # somebody has repaired it
        assert states(engine) == ["living", "living"]
        servers[1].faults_of["/update_weights_from_disk"] = servers[0].faults_of["/update_weights_from_disk"] = 500
        with pytest.raises(ServerError, match="weights of version 3: "):
            engine.update_weights(stream, version=3)
        with pytest.raises(RuntimeError, match="half updated"):
            engine.generate(REQUESTS, PARAMS)
        assert engine.version == 2


def test_a_server_must_report_the_version_it_was_sent(sglang_model: Path, stream: Any) -> None:
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        answered = servers[0].answered

        async def keep_version(request: Any, body: Body) -> Any:
            version = servers[0].weight_version
            response = await answered(request, body)
            servers[0].weight_version = version
            return response

        servers[0].answered = keep_version  # type: ignore[method-assign]
        with pytest.raises(ServerError, match=rf"SGLang server {servers[0].url} reports default"):
            engine.update_weights(stream, version=7)


def test_servers_pause_while_weights_arrive(sglang_model: Path, stream: Any) -> None:
    """Requests under way are retracted before the weights come, and go on after them; an idle server is not paused."""
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        engine.update_weights(stream, version=1)
        paths = [path for path, _ in servers[0].seen]
        assert "/pause_generation" not in paths and paths[-1] == "/continue_generation"
        servers[0].seen.clear()
        servers[0].gate = asyncio.Event()
        found: list[Generation] = []
        thread = threading.Thread(target=lambda: found.extend(engine.generate(REQUESTS, PARAMS)))
        thread.start()
        wait_until(lambda: len(servers[0].asked("/generate")) == 4)
        engine.update_weights(stream, version=2)
        paths = [path for path, _ in servers[0].seen if not path.startswith(("/generate", "/health"))]
        assert paths[0] == "/pause_generation" and servers[0].asked("/pause_generation") == [{"mode": "retract"}]
        assert paths.index("/update_weights_from_disk") < paths.index("/continue_generation") == len(paths) - 1
        servers[0].gate.set()
        servers[0].gate = None
        release(engine, servers)
        thread.join(30)
        assert_whole(found, version=2)


def test_the_rest_is_given_up(sglang_model: Path) -> None:
    """A watch that has enough: what runs is aborted by its name, what waits is not sent."""
    with stub_servers(sglang_model) as servers, opened(servers, max_concurrent_requests=2) as engine:
        done = Generation([3] * 6, [0.0] * 6, [-1.0] * 6, "length", [0] * 6)
        requests = [*REQUESTS, GenerationRequest([5], 9, done)]
        servers[0].faults = ["hang"] * 8
        asked: list[str] = []
        answered = servers[0].answered

        async def abort(request: Any, body: Body) -> Any:
            if request.path == "/abort_request":
                asked.append(body["rid"])
                for server in engine.pool.servers:
                    for waiting in list(server.requests):
                        engine.thread.loop.call_soon_threadsafe(waiting.cancel)
            return await answered(request, body)

        servers[0].answered = abort  # type: ignore[method-assign]
        generations = engine.generate(requests, PARAMS, lambda index, generation: index == 4)
        running = [body["rid"] for body in servers[0].asked("/generate")]
        # The watch may have enough before the second request has reached its server, and the stub ends both requests
        # when it is asked to abort the first.
        assert asked and len({*running, *asked}) <= 2
        assert [len(generation.response_ids) for generation in generations] == [0, 0, 0, 0, 6]
        assert {generation.finish_reason for generation in generations[:4]} == {"abort"}
        assert engine.flush_metrics()["rollout/num_aborted"] == 4


def test_a_router_gets_first_attempts_while_all_have_the_same_weights(sglang_model: Path) -> None:
    with stub_servers(sglang_model, 3) as (first, second, router):
        with opened([first, second], router=router) as engine:
            router.faults = [503]
            assert_whole(engine.generate(REQUESTS, PARAMS))
            assert len(router.asked("/generate")) == 4
            assert len(first.asked("/generate")) + len(second.asked("/generate")) == 1
            engine.thread.run(marked_dead(engine.pool))
            assert_whole(engine.generate(REQUESTS, PARAMS))
            assert len(router.asked("/generate")) == 4 and not first.asked("/generate")[1:]


async def marked_dead(pool: ServerPool) -> None:
    pool.mark_dead(pool.servers[0], "for the test")


def test_unfit_servers_are_refused(sglang_model: Path, untied_path: Path) -> None:
    def refused(server: StubServer) -> str:
        with pytest.raises(ValueError) as error, opened([server]):
            pass
        assert "\n" not in str(error.value)
        return str(error.value)

    with stub_servers(sglang_model) as (server,):
        server.faults_of["/pause_generation"] = 404
        assert "/pause_generation was answered 404" in refused(server) and "install sglang>=" in refused(server)
        server.faults_of.clear()
        server.faults_of["/v1/models"] = "garbage"
        assert "is it running, and is its address right?" in refused(server)
        server.faults_of.clear()
        server.model_path = untied_path
        assert "another vocabulary than the 24 tokens of model.path" in refused(server)
        server.model_path = sglang_model
        with opened([server]) as engine:
            assert engine.generate([], PARAMS) == []
            with pytest.raises(ValueError, match="vocabulary of 64"):
                engine.generate([GenerationRequest([64], 0)], PARAMS)
            with pytest.raises(ValueError, match=r"make 511, SGLang server http.* takes 510"):
                engine.generate([GenerationRequest([5] * 11, 0)], replace(PARAMS, max_new_tokens=500))
            assert len(engine.generate([GenerationRequest([5] * 10, 0)], replace(PARAMS, max_new_tokens=500))) == 1
            engine.check_unchanged()
        server.weight_version = "4"
        with (
            opened([server]) as engine,
            pytest.raises(ValueError, match=r"has weights of version 4 from a training run"),
        ):
            engine.check_unchanged()


def test_tempered_log_probs_are_found_and_temperatures_refused(sglang_model: Path) -> None:
    with stub_servers(sglang_model) as (server,):
        plain = server.answer

        def tempered(body: Body, *args: Any, **options: Any) -> Body:
            answer = plain(body, *args, **options)
            if body["sampling_params"]["temperature"] not in (0, 1):
                for row in answer["meta_info"]["output_token_logprobs"]:
                    row[0] += 0.1
            return answer

        server.answer = tempered  # type: ignore[method-assign]
        with opened([server]) as engine:
            assert_whole(engine.generate(REQUESTS, PARAMS))
            with pytest.raises(ValueError, match=r"rollout\.temperature=0\.5: .* gives tempered log-probs"):
                engine.generate(REQUESTS, replace(PARAMS, temperature=0.5))


def test_log_probs_of_another_temperature_are_not_the_rollouts(sglang_model: Path) -> None:
    with stub_servers(sglang_model) as servers, opened(servers) as engine:
        plain = engine.generate(REQUESTS, PARAMS)
        warm = engine.generate(REQUESTS, replace(PARAMS, temperature=0.5))
        greedy = engine.generate(REQUESTS, replace(PARAMS, temperature=0))
    assert all(np.array_equal(one.rollout_logprobs, one.model_logprobs) for one in plain)
    assert all(not len(one.rollout_logprobs) and len(one.model_logprobs) == 6 for one in warm)
    assert all(one.rollout_logprobs.tolist() == [0.0] * 6 for one in greedy)


def test_weights_of_another_run_are_refused(sglang_model: Path, stream: Any) -> None:
    """Two runs with the same servers count their versions alike, and each must get its own weights."""
    with stub_servers(sglang_model) as servers, opened(servers) as engine, opened(servers) as other:
        engine.update_weights(stream, version=4)
        assert_whole(engine.generate(REQUESTS, PARAMS), version=4)
        other.update_weights(stream, version=4)
        with pytest.raises(ServerError, match=r"has weights of another run \(.*give each run servers of its own"):
            engine.generate(REQUESTS, PARAMS)
        with pytest.raises(ServerError, match=r"has weights of another run"):
            engine.update_weights(stream, version=5)
        assert_whole(other.generate(REQUESTS, PARAMS), version=4)


def test_the_last_server_is_waited_for_and_gets_the_weights(sglang_model: Path, stream: Any) -> None:
    """The main thread, which waits for the rollout, sends the weights of the step once more."""
    with stub_servers(sglang_model, 2) as (first, spare):
        fleet = FakeFleet([spare.endpoint])
        with opened([first], fleet) as engine:
            engine.update_weights(stream, version=3)
            fleet.ended.add(first.endpoint)
            wait_until(lambda: states(engine) == ["stale"])
            assert_whole(generate_beside(engine), version=3)
            assert version_of(spare.weight_version) == 3


def test_a_server_that_others_start_again_is_found(sglang_model: Path, stream: Any) -> None:
    """It has another address and other keys, which the file names by now."""
    with stub_servers(sglang_model, 2) as (first, second):
        second.api_key, second.admin_key = "new", "new too"
        fleet = FakeFleet([])
        fleet.elsewhere = [first.endpoint]
        with opened([first], fleet, max_failures=1) as engine:
            engine.update_weights(stream, version=1)
            first.faults_of["/generate"] = first.faults_of["/model_info"] = first.faults_of["/health"] = "cut"
            begin = threading.Timer(1, lambda: fleet.elsewhere.append(second.endpoint))
            begin.start()
            assert_whole(generate_beside(engine), version=1)
            assert engine.pool.servers[0].client.endpoint == second.endpoint


def test_the_wait_for_a_server_has_an_end(sglang_model: Path, stream: Any) -> None:
    with stub_servers(sglang_model) as [server]:
        fleet = FakeFleet([])
        fleet.elsewhere = [server.endpoint]
        with opened([server], fleet, max_failures=1, outage_seconds=0.5) as engine:
            engine.update_weights(stream, version=1)
            server.faults_of["/generate"] = server.faults_of["/model_info"] = "cut"
            with pytest.raises(ServerError, match=r"no SGLang server is left.*outage_seconds=0.5"):
                generate_beside(engine)


def generate_beside(engine: SglangEngine) -> list[Generation]:
    """Generates in a thread, while the main thread takes part in what the engine asks of it."""
    future = in_thread(lambda: engine.generate(REQUESTS, PARAMS))
    future.add_done_callback(lambda _: engine.calls.wake())
    deadline = time.monotonic() + 60
    while not future.done():
        assert time.monotonic() < deadline
        if engine.calls.wait(future.done, 1):
            engine.take_part()
    return future.result()
