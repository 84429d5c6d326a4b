"""Weights into a real SGLang server, compared with transformers; and what goes wrong on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from aiohttp import ClientSession, web

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint, write_endpoints
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet, open_servers
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.engines.sglang.weights.buckets import buckets
from megatron_oreal.engines.sglang.weights.distributed import TwoBuffers, address_for
from megatron_oreal.engines.sglang.weights.requests import WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import Checksums, clients_of_rank
from megatron_oreal.weights.fingerprint import MeasuredStream, drain
from tests.support.paths import ROOT, SGLANG_PYTHON
from tests.support.weight_checks import check_outputs, noisy_weights, open_transport, signalling_stream

TRANSPORTS = ["disk", "distributed", "tensor"]


def test_buckets_hold_whole_tensors_at_multiples_of_their_size() -> None:
    first, second, third = torch.arange(6.0), torch.tensor([1, 2, 3], dtype=torch.uint8), torch.arange(4.0)
    large, last = torch.arange(30.0).view(5, 6), torch.tensor(7, dtype=torch.bfloat16)
    stream = [("first", first), ("second", second), ("third", third), ("large", large), ("last", last)]
    found, contents = [], {}
    for bucket in buckets(stream, 60, TwoBuffers(60)):
        found.append((bucket.names, bucket.flat.numel(), bucket.is_last))
        offset = 0
        for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
            size = shape.numel() * dtype.itemsize
            contents[name] = bucket.flat[offset : offset + size].view(dtype).view(shape).clone()
            offset += size
    # 27 is no multiple of 4; 120 bytes are more than a bucket.
    assert found == [
        (["first", "second"], 27, False),
        (["third"], 16, False),
        (["large"], 120, False),
        (["last"], 2, True),
    ]
    assert all(torch.equal(contents[name], tensor) and contents[name].dtype == tensor.dtype for name, tensor in stream)


def test_a_bucket_under_way_is_not_overwritten() -> None:
    buffers = TwoBuffers(8)
    first, second, third = (buffers(size, torch.device("cpu")) for size in (8, 4, 6))
    assert first.data_ptr() != second.data_ptr()
    assert third.data_ptr() == first.data_ptr()
    assert buffers(9, torch.device("cpu")).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_servers_are_shared_out_among_senders() -> None:
    clients = [SglangClient(Endpoint(f"http://{number}", "", "")) for number in range(5)]
    shares = [clients_of_rank(clients, rank, num_senders=2) for rank in range(4)]
    assert shares == [[clients[0], clients[2], clients[4]], [clients[1], clients[3]], [], []]


def test_the_sender_is_reached_where_its_servers_are() -> None:
    def client(host: str) -> SglangClient:
        return SglangClient(Endpoint(f"http://{host}:31000", "", ""))

    assert address_for([client("127.0.0.1"), client("localhost")]) == "127.0.0.1"
    assert address_for([client("[::1]")]) == "::1"


def test_checksums_must_agree_and_change_with_what_was_sent() -> None:
    checksums = Checksums()
    checksums.compare("sent 1", {"a": "x", "b": "x"}, 1)
    checksums.compare("sent 1", {"a": "x", "b": "x"}, 2)  # the same again
    with pytest.raises(WeightSyncError, match="version 3: SGLang server b holds others than most"):
        checksums.compare("sent 2", {"a": "y", "b": "x", "c": "y"}, 3)
    with pytest.raises(WeightSyncError, match="those of SGLang server a stayed as they were"):
        checksums.compare("sent 2", {"a": "x", "b": "x"}, 3)
    with pytest.raises(WeightSyncError, match="changed although the same were sent"):
        checksums.compare("sent 1", {"a": "y", "b": "y"}, 3)
    checksums.compare("sent 2", {"a": "y", "new": "y"}, 3)


def test_a_stream_has_a_size_and_a_fingerprint_of_names_and_values() -> None:
    def fingerprint(**tensors: torch.Tensor) -> tuple[int, str]:
        stream = MeasuredStream(tensors.items(), has_fingerprint=True)
        drain(stream)
        return stream.num_bytes, stream.fingerprint

    ones = torch.ones(3, dtype=torch.bfloat16)
    num_bytes, one = fingerprint(a=ones, b=ones)
    assert num_bytes == 12
    assert one == fingerprint(a=ones.clone(), b=ones)[1]
    assert len({one, fingerprint(a=ones, c=ones)[1], fingerprint(a=ones, b=ones * 2)[1]}) == 3


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread("weights")
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def client(sglang_fleet: ServerFleet, sglang_model: Path, loop: EventLoopThread) -> Iterator[SglangClient]:
    """Of the common server, whose weights are put back."""
    client = SglangClient(sglang_fleet.endpoints[0])
    yield client
    loop.run(client.control("/update_weights_from_disk", {"model_path": str(sglang_model), "flush_cache": True}, 60))
    loop.run(client.close())


@pytest.mark.sglang
@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_push_makes_the_server_generate_as_transformers_does(
    kind: str, client: SglangClient, loop: EventLoopThread, sglang_model: Path, tmp_path: Path
) -> None:
    transport = open_transport(kind, loop, sglang_model, tmp_path)
    for version in (1, 2, 3):
        weights = noisy_weights(sglang_model, seed=max(version, 2))  # the last two alike
        measured = MeasuredStream(weights.items())
        transport.push(measured, version, [client])
        assert measured.num_bytes == sum(tensor.nbytes for tensor in weights.values())
        check_outputs(loop, client, sglang_model, weights, version)
    transport.close()
    if kind == "disk":
        assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_000003"]


@pytest.mark.sglang
def test_a_wrong_shape_names_the_server_and_the_next_push_works(
    client: SglangClient, loop: EventLoopThread, sglang_model: Path, tmp_path: Path
) -> None:
    """By the other transports a wrong shape ends SGLang 0.5.23."""
    transport = open_transport("distributed", loop, sglang_model, tmp_path, timeout_seconds=30)
    weights = noisy_weights(sglang_model, seed=4)
    wrong = weights | {"model.layers.0.mlp.down_proj.weight": torch.zeros(3, 5)}
    with pytest.raises(WeightSyncError, match=r"weights of version 4: .*was answered 400") as raised:
        transport.push(wrong.items(), 4, [client])
    assert raised.value.urls == [client.endpoint.url]
    assert client.endpoint.url in str(raised.value)
    transport.push(weights.items(), 5, [client])
    check_outputs(loop, client, sglang_model, weights, 5)
    transport.close()


@pytest.mark.sglang
@pytest.mark.parametrize("kind", TRANSPORTS)
def test_a_hung_server_ends_the_push_within_its_timeout(
    kind: str,
    client: SglangClient,
    loop: EventLoopThread,
    sglang_fleet: ServerFleet,
    sglang_model: Path,
    tmp_path: Path,
) -> None:
    weights = noisy_weights(sglang_model, seed=6)
    transport = open_transport(kind, loop, sglang_model, tmp_path, timeout_seconds=2)
    processes = process_tree(sglang_fleet.pid(client.endpoint))
    begin = time.monotonic()
    try:
        with pytest.raises(WeightSyncError, match=f"weights of version 6: .*{client.endpoint.url}") as raised:
            transport.push(signalling_stream(weights, 5, processes, signal.SIGSTOP), 6, [client])
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
    assert time.monotonic() - begin < 20
    assert raised.value.urls == [client.endpoint.url]
    transport.timeout_seconds = 60
    transport.push(weights.items(), 7, [client])
    check_outputs(loop, client, sglang_model, weights, 7)
    transport.close()


@pytest.mark.sglang
@pytest.mark.parametrize("kind", ["distributed", "tensor"])
def test_a_trainer_killed_in_a_push_leaves_a_server_that_another_one_can_use(
    kind: str, client: SglangClient, loop: EventLoopThread, sglang_model: Path, tmp_path: Path
) -> None:
    write_endpoints(tmp_path / "servers.json", [client.endpoint])
    command = [sys.executable, "-m", "tests.support.workers.weights_worker", "die", kind]
    with (tmp_path / "output").open("w") as output:
        arguments = [*command, tmp_path / "servers.json", sglang_model, tmp_path]
        killed = subprocess.run(arguments, cwd=ROOT, stdout=output, stderr=output, timeout=200, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert loop.run(client.get("/model_info", 60))["weight_version"] != "99"
    weights = noisy_weights(sglang_model, seed=8)
    transport = open_transport(kind, loop, sglang_model, tmp_path)
    transport.push(weights.items(), 8, [client])
    check_outputs(loop, client, sglang_model, weights, 8)
    transport.close()


@pytest.mark.sglang
def test_a_wrong_key_and_an_absent_server_are_named(
    client: SglangClient, loop: EventLoopThread, sglang_model: Path, tmp_path: Path
) -> None:
    transport = open_transport("distributed", loop, sglang_model, tmp_path, timeout_seconds=30)
    stranger = SglangClient(replace(client.endpoint, admin_key="wrong"))
    with pytest.raises(WeightSyncError, match="was answered 401"):
        transport.push(noisy_weights(sglang_model, seed=9).items(), 9, [stranger])
    absent = SglangClient(replace(client.endpoint, url="http://127.0.0.1:9"))
    with pytest.raises(WeightSyncError, match=r"http://127\.0\.0\.1:9") as raised:
        transport.push(noisy_weights(sglang_model, seed=9).items(), 9, [absent, client])
    assert raised.value.urls == ["http://127.0.0.1:9"]
    weights = noisy_weights(sglang_model, seed=10)
    transport.forget(absent)
    transport.push(weights.items(), 10, [client])
    check_outputs(loop, client, sglang_model, weights, 10)
    transport.close()
    for each in (stranger, absent):
        loop.run(each.close())


@pytest.mark.sglang
@pytest.mark.parametrize("kind", ["distributed", "tensor"])
def test_a_release_without_begin_and_end_is_pushed_to_without_them(
    kind: str, client: SglangClient, loop: EventLoopThread, sglang_model: Path, tmp_path: Path
) -> None:
    missing = {"/begin_weight_update": 404, "/end_weight_update": 404}
    transport = open_transport(kind, loop, sglang_model, tmp_path)
    with proxied(client, loop, missing) as (old, asked):
        for version in (11, 12):
            weights = noisy_weights(sglang_model, seed=version)
            # The server behind the proxy does want them.
            loop.run(client.control("/begin_weight_update", {}, 60))
            transport.push(weights.items(), version, [old])
            loop.run(client.control("/end_weight_update", {}, 60))
            check_outputs(loop, client, sglang_model, weights, version)
        assert asked.count("/begin_weight_update") == 1
        assert "/end_weight_update" not in asked
        transport.forget(old)  # another release may be there next time
        loop.run(client.control("/begin_weight_update", {}, 60))
        transport.push(weights.items(), 13, [old])
        loop.run(client.control("/end_weight_update", {}, 60))
        assert asked.count("/begin_weight_update") == 2
        transport.close()


@pytest.mark.sglang
@pytest.mark.parametrize("path", ["/init_weights_update_group", "/update_weights_from_distributed"])
def test_a_refusal_ends_the_collective_at_once(
    path: str, client: SglangClient, loop: EventLoopThread, sglang_model: Path, tmp_path: Path
) -> None:
    """The server never hears of the request: without the answer, the sender would wait for it in vain."""
    weights = noisy_weights(sglang_model, seed=14)
    transport = open_transport("distributed", loop, sglang_model, tmp_path, timeout_seconds=100)
    begin = time.monotonic()
    with proxied(client, loop, {path: 500}) as (refusing, _):
        with pytest.raises(WeightSyncError, match=f"weights of version 14: .*{path} was answered 500"):
            transport.push(weights.items(), 14, [refusing])
        assert time.monotonic() - begin < 30
    transport.push(weights.items(), 15, [client])
    check_outputs(loop, client, sglang_model, weights, 15)
    transport.close()


@pytest.mark.sglang
@pytest.mark.timeout(600)
def test_every_layout_of_the_trainer_makes_the_server_generate_as_transformers_does(
    client: SglangClient, sglang_model: Path, tmp_path: Path
) -> None:
    run_layouts([client.endpoint], 1, sglang_model, tmp_path)


@pytest.mark.sglang
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_senders_share_two_servers(sglang_model: Path, tmp_path: Path) -> None:
    config = SglangConfig(python=SGLANG_PYTHON, num_servers=2, start_timeout_seconds=500)
    settings = ServerSettings(config, sglang_model, "float32", tmp_path, "cpu", context_length=512)
    with open_servers(settings, print) as fleet:
        run_layouts(fleet.endpoints, 2, sglang_model, tmp_path)


def run_layouts(endpoints: list[Endpoint], num_senders: int, model: Path, folder: Path) -> None:
    """The trainer at TP1, TP2 and PP2, in two processes, with each transport."""
    write_endpoints(folder / "endpoints.json", endpoints)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.support.workers.weights_worker", "layouts", str(num_senders), folder / "endpoints.json"]
    # Not into a pipe: torch's manager of shared memory keeps it open as long as the server lives.
    with (folder / "output").open("w") as output:
        arguments = [*command, *worker, model, folder]
        run = subprocess.run(arguments, cwd=ROOT, stdout=output, stderr=output, timeout=500, check=False)
    text = (folder / "output").read_text()
    assert run.returncode == 0, text[-8000:]
    assert text.count("passed") == 2 * 3


def process_tree(pid: int) -> list[int]:
    """A process and all that came from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in process_tree(int(child)))]


@contextmanager
def proxied(
    client: SglangClient, loop: EventLoopThread, statuses: dict[str, int]
) -> Iterator[tuple[SglangClient, list[str]]]:
    """The server behind a proxy that answers some paths itself, with an error; and the paths that were asked for."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path in statuses:
            return web.Response(status=statuses[request.path], text="by the proxy")
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        async with ClientSession() as session:
            async with session.request(
                request.method, client.endpoint.url + request.path, data=await request.read(), headers=headers
            ) as answer:
                return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    runner = loop.run(start())
    behind = SglangClient(replace(client.endpoint, url=f"http://127.0.0.1:{runner.addresses[0][1]}"))
    yield behind, asked
    loop.run(behind.close())
    loop.run(runner.cleanup())
