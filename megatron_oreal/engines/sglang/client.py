"""Sends HTTP requests to one SGLang server, on the event loop of a separate thread."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.listening import stranger_listens
from megatron_oreal.observability.event_loop import EventLoopThread as EventLoopThread

CONNECT_SECONDS = 10.0
# The upper bound of an answer's bytes; the longest answers are those about checksums, with one line per tensor.
MAX_ANSWER_BYTES = 64 * 2**20
# The bytes of an answer to /generate: the part of fixed size, and an id, a log-prob and the text of each token.
GENERATE_BYTES, GENERATE_BYTES_PER_TOKEN = 2**20, 2**10
MAX_REFUSAL_BYTES = 2**16


class ServerError(OSError):
    """A server cannot be reached, or its answer is wrong. The message names the server and the request."""


class ServerRefusal(ServerError):
    """The server answered with an error. The same request would fail again, unless the status says otherwise."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class MalformedAnswer(ServerError):
    """This package does not understand the server's answer, so a retry is useless."""


@dataclass(slots=True, frozen=True, eq=False)
class OpenRequest:
    """A request without an answer so far; its times are those of time.monotonic."""

    what: str  # "POST /generate"
    request_id: str  # empty if the request has none
    since: float
    deadline: float


class SglangClient:
    """The connections to one server. Its coroutines run on the event loop of an `EventLoopThread`."""

    def __init__(self, endpoint: Endpoint, max_connections: int = 256) -> None:
        self.endpoint, self.max_connections = endpoint, max_connections
        self.last_answer = 0.0  # time.monotonic at the server's last answer
        self.session: aiohttp.ClientSession | None = None  # must be created on the event loop that uses it
        self.open_requests: set[OpenRequest] = set()  # any thread may copy it

    async def get(self, path: str, timeout_seconds: float) -> Any:
        return await self._request("GET", path, None, timeout_seconds, self.endpoint.api_key)

    async def generate(self, body: dict[str, Any], timeout_seconds: float) -> Any:
        key, limit = self.endpoint.api_key, GENERATE_BYTES + GENERATE_BYTES_PER_TOKEN * num_tokens_asked(body)
        return await self._request("POST", "/generate", body, timeout_seconds, key, limit)

    async def control(self, path: str, body: dict[str, Any], timeout_seconds: float) -> Any:
        """Sends a POST that needs the admin key: for weights, pauses or memory."""
        return await self._request("POST", path, body, timeout_seconds, self.endpoint.admin_key)

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()
            self.session = None

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_seconds: float,
        key: str,
        max_bytes: int = MAX_ANSWER_BYTES,
    ) -> Any:
        """Returns the answer's JSON, or its text. Raises ServerError after the timeout or without a connection.

        Only this server receives the key; the client treats a redirect as a refusal.
        """
        if self.session is None:
            self.session = self._open_session()
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(CONNECT_SECONDS, timeout_seconds))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        what = f"SGLang server {self.endpoint}: {method} {path}"
        now, request_id = time.monotonic(), str((body or {}).get("rid", ""))
        request = OpenRequest(f"{method} {path}", request_id, now, now + timeout_seconds)
        self.open_requests.add(request)
        try:
            async with self.session.request(
                method, self.endpoint.url + path, json=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                self.last_answer = time.monotonic()
                if response.status != 200:
                    text = " ".join((await read(response, MAX_REFUSAL_BYTES))[0].split())[:300]
                    raise ServerRefusal(f"{what} was answered {response.status}: {text}", response.status)
                text, is_whole = await read(response, max_bytes)
                if not is_whole:
                    raise MalformedAnswer(f"{what} was answered with more than {max_bytes} bytes")
                return json.loads(text) if response.content_type == "application/json" else text
        except asyncio.TimeoutError:
            raise ServerError(f"{what} got no answer within {timeout_seconds:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(f"{what} failed: {error or type(error).__name__}") from None
        except (ValueError, RecursionError) as error:
            raise ServerError(f"{what} was answered with broken JSON: {error}") from None
        finally:
            self.open_requests.discard(request)

    def _open_session(self) -> aiohttp.ClientSession:
        """Opens the connections, which verify the server before they send a key.

        If the server on this machine has died, another user might listen at its address; such a listener is refused. A
        server with https must show the certificate whose fingerprint its file names, whoever signed it.
        """
        certificate = self.endpoint.certificate
        connector = aiohttp.TCPConnector(
            limit=self.max_connections, ssl=aiohttp.Fingerprint(bytes.fromhex(certificate)) if certificate else True
        )
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_create_end.append(self._check_listener)
        # Compressed answers could have any size after decompression.
        headers = {"Accept-Encoding": "identity"}
        return aiohttp.ClientSession(
            connector=connector, trace_configs=[tracing], headers=headers, auto_decompress=False
        )

    async def _check_listener(self, *_: object) -> None:
        url = urlsplit(self.endpoint.url)
        assert url.hostname is not None and url.port is not None
        if url.scheme == "http" and await asyncio.to_thread(stranger_listens, url.hostname, url.port):
            raise ServerError(f"SGLang server {self.endpoint} is gone: another user of this machine listens there")


async def read(response: aiohttp.ClientResponse, max_bytes: int) -> tuple[str, bool]:
    """Returns the text of an answer, and whether it is complete; reads at most `max_bytes`."""
    content = bytearray()
    async for part in response.content.iter_any():
        content += part
        if len(content) > max_bytes:
            response.close()
            break
    return content[:max_bytes].decode(errors="replace"), len(content) <= max_bytes


def num_tokens_asked(body: dict[str, Any]) -> int:
    """Returns the largest total number of tokens in the answers to a request to /generate."""
    prompts = body.get("input_ids", [])
    num_prompts = len(prompts) if prompts and isinstance(prompts[0], list) else 1
    return num_prompts * int(body.get("sampling_params", {}).get("max_new_tokens", 0))
