"""Speaks HTTP to one SGLang server, on the event loop of a thread of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.observability.event_loop import EventLoopThread as EventLoopThread

CONNECT_SECONDS = 10.0


class ServerError(OSError):
    """A server cannot be reached, or did not answer as it should. The message names the server and the request."""


class ServerRefusal(ServerError):
    """The server answered with an error. The same request would fail again, unless the status says otherwise."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class SglangClient:
    """The connections to one server. Its coroutines run on the event loop of an `EventLoopThread`."""

    def __init__(self, endpoint: Endpoint, max_connections: int = 256) -> None:
        self.endpoint, self.max_connections = endpoint, max_connections
        self.session: aiohttp.ClientSession | None = None  # it must be made on the event loop that uses it

    async def get(self, path: str, timeout_seconds: float) -> Any:
        return await self._request("GET", path, None, timeout_seconds, self.endpoint.api_key)

    async def generate(self, body: dict[str, Any], timeout_seconds: float) -> Any:
        return await self._request("POST", "/generate", body, timeout_seconds, self.endpoint.api_key)

    async def control(self, path: str, body: dict[str, Any], timeout_seconds: float) -> Any:
        """Sends a POST that needs the admin key: about weights, pauses or memory."""
        return await self._request("POST", path, body, timeout_seconds, self.endpoint.admin_key)

    async def close(self) -> None:
        if self.session is not None:
            await self.session.close()
            self.session = None

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, timeout_seconds: float, key: str
    ) -> Any:
        """Returns the answer's JSON, or its text. Raises ServerError after the timeout or without a connection."""
        if self.session is None:
            connector = aiohttp.TCPConnector(limit=self.max_connections)
            self.session = aiohttp.ClientSession(connector=connector)
        timeout = aiohttp.ClientTimeout(total=timeout_seconds, sock_connect=min(CONNECT_SECONDS, timeout_seconds))
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        what = f"SGLang server {self.endpoint}: {method} {path}"
        try:
            async with self.session.request(
                method, self.endpoint.url + path, json=body, headers=headers, timeout=timeout
            ) as response:
                if response.status != 200:
                    text = " ".join((await response.text()).split())[:300]
                    raise ServerRefusal(f"{what} was answered {response.status}: {text}", response.status)
                if response.content_type == "application/json":
                    return await response.json()
                return await response.text()
        except asyncio.TimeoutError:
            raise ServerError(f"{what} got no answer within {timeout_seconds:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(f"{what} failed: {error or type(error).__name__}") from None
        except ValueError as error:
            raise ServerError(f"{what} was answered with broken JSON: {error}") from None
