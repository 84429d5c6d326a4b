"""Provides an HTTP server that answers as its script says. It writes raw bytes, so it can break any rule of HTTP."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from megatron_oreal.observability.event_loop import EventLoopThread

Answer = Callable[[Any], Any]  # from the request's JSON to the answer's


@dataclass
class Request:
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class MisbehavingServer:
    """`script` lists the behaviour for the next requests, "ok" when it is empty; `always` applies to all requests."""

    answer: Answer
    script: list[str] = field(default_factory=list)
    always: str = "ok"
    requests: list[Request] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    port: int = 0
    pause_seconds: float = 0.0  # pause before a valid answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:-2])}
            body = json.loads(await reader.readexactly(int(headers["content-length"])))
            self.requests.append(Request(head[0].split()[1], headers, body))
            await self.treat(self.script.pop(0) if self.script else self.always, body, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.num_open -= 1
            writer.close()

    async def treat(self, how: str, body: Any, writer: asyncio.StreamWriter) -> None:
        good = json.dumps(self.answer(body)).encode()
        status, _, rest = how.partition(" ")
        if how == "ok":
            await asyncio.sleep(self.pause_seconds)
            writer.write(response(200, good))
        elif how == "slow":
            await asyncio.sleep(30)
        elif how == "drip":
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"X: y\r\n")
                await writer.drain()
                await asyncio.sleep(0.02)
        elif how == "garbage":
            writer.write(response(200, b"\xff{ this is no JSON"))
        elif how == "nested":
            writer.write(response(200, b"[" * 200_000))
        elif how == "truncated":
            writer.write(response(200, good)[:-5])
        elif how == "huge":
            writer.write(response(200, b'{"a": "' + b"x" * 3_000_000 + b'"}'))
        elif how == "endless":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
        elif how == "redirect":
            writer.write(response(307, b"", f"Location: http://127.0.0.1:{self.port}/elsewhere\r\n"))
        elif how == "reset":
            # Closing with a linger time of 0 sends a reset.
            writer.get_extra_info("socket").setsockopt(1, 13, struct.pack("ii", 1, 0))
        elif how == "no http":
            writer.write(b"220 mail.example SMTP\r\n\r\n")
        else:
            writer.write(response(int(status), (rest or "trouble").encode(), "Retry-After: 0\r\n"))
        await writer.drain()


def response(status: int, content: bytes, headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nConnection: close\r\n{headers}"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def misbehaving_server(answer: Answer) -> Iterator[MisbehavingServer]:
    thread, server = EventLoopThread("server"), MisbehavingServer(answer)

    async def start() -> asyncio.Server:
        return await asyncio.start_server(server.serve, "127.0.0.1", 0)

    async def stop(listening: asyncio.Server) -> None:
        listening.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    listening = thread.run(start())
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        thread.run(stop(listening))
        thread.close()
