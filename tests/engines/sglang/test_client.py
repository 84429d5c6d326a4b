"""What a server may do with the trainer that asks it: nothing that its answer does not need."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from megatron_oreal.engines.sglang.client import (
    EventLoopThread,
    MalformedAnswer,
    ServerError,
    ServerRefusal,
    SglangClient,
    num_tokens_asked,
)
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.generate_api import may_ask_again
from megatron_oreal.engines.sglang.servers.answers import answer


class Stub(ThreadingHTTPServer):
    """Answers each path as `answers` says: status, headers, pieces of the body."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, dict[str, str], list[bytes]]] = {}
        self.keys: list[str | None] = []

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"http://127.0.0.1:{self.server_address[1]}", "SECRET", "ADMIN")


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.keys.append(self.headers.get("Authorization"))
        status, headers, pieces = self.server.answers[self.path]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for piece in pieces:
                self.wfile.write(piece)
        except OSError:  # the client has heard enough
            pass

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[tuple[Stub, Stub]]:
    both = Stub(), Stub()
    for server in both:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoopThread]:
    thread = EventLoopThread("test")
    yield thread
    thread.close()


def ask(loop: EventLoopThread, endpoint: Endpoint, request: str, *arguments: Any) -> Any:
    async def asking() -> Any:
        client = SglangClient(endpoint)
        try:
            return await getattr(client, request)(*arguments, 10)
        finally:
            await client.close()

    return loop.run(asking())


JSON = {"Content-Type": "application/json"}
GENERATE = {"input_ids": [1], "sampling_params": {"max_new_tokens": 2}}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_key_follows_no_redirect(servers: tuple[Stub, Stub], loop: EventLoopThread, status: int) -> None:
    first, second = servers
    second.answers = dict.fromkeys(("/generate", "/model_info", "/pause"), (200, JSON, [b"{}"]))
    for path in ("/generate", "/model_info", "/pause"):
        first.answers[path] = (status, {"Location": f"http://localhost:{second.server_address[1]}{path}"}, [])
    for request in (("generate", GENERATE), ("get", "/model_info"), ("control", "/pause", {})):
        with pytest.raises(ServerRefusal, match=f"was answered {status}"):
            ask(loop, first.endpoint, *request)
    assert answer(first.endpoint, "/model_info", "SECRET") == (status, None)
    assert first.keys == ["Bearer SECRET", "Bearer SECRET", "Bearer ADMIN", "Bearer SECRET"]
    assert second.keys == []


def endless() -> Iterator[bytes]:
    yield b'{"output_ids": ['
    while True:
        yield b"1, " * 2**14


def test_an_endless_answer_ends(servers: tuple[Stub, Stub], loop: EventLoopThread) -> None:
    server, _ = servers
    server.answers["/generate"] = (200, JSON, endless())  # type: ignore[assignment]
    with pytest.raises(MalformedAnswer, match=f"more than {2**20 + 2 * 2**10} bytes") as caught:
        ask(loop, server.endpoint, "generate", GENERATE)
    assert not may_ask_again(caught.value)
    server.answers["/model_info"] = (404, JSON, endless())  # type: ignore[assignment]
    with pytest.raises(ServerRefusal, match="was answered 404"):
        ask(loop, server.endpoint, "get", "/model_info")
    server.answers["/model_info"] = (200, JSON, endless())  # type: ignore[assignment]
    assert answer(server.endpoint, "/model_info", "") == (200, None)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{", b"\xff\xfe", b'"\\ud800'], ids=["deep", "short", "bytes", "half"]
)
def test_broken_json_names_the_server(servers: tuple[Stub, Stub], loop: EventLoopThread, content: bytes) -> None:
    server, _ = servers
    server.answers["/model_info"] = (200, JSON, [content])
    with pytest.raises(ServerError, match=r"http://127.0.0.1:.*was answered with broken JSON"):
        ask(loop, server.endpoint, "get", "/model_info")
    assert answer(server.endpoint, "/model_info", "") == (200, None)


def test_compressed_answers_are_not_unpacked(servers: tuple[Stub, Stub], loop: EventLoopThread) -> None:
    server, _ = servers
    import gzip

    bomb = gzip.compress(b" " * 2**26)
    server.answers["/model_info"] = (200, JSON | {"Content-Encoding": "gzip"}, [bomb])
    with pytest.raises(ServerError, match="broken JSON"):
        ask(loop, server.endpoint, "get", "/model_info")


def test_tokens_are_counted() -> None:
    assert num_tokens_asked(GENERATE) == 2
    assert num_tokens_asked(GENERATE | {"input_ids": [[1], [2, 3], [4]]}) == 6
    assert num_tokens_asked({}) == 0
