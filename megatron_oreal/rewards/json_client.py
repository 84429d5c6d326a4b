"""Posts JSON to a possibly faulty server: bounds concurrency, time and size, retries, and follows no redirects.

Each client runs one event loop in its own thread. This module uses a server's answer only to decide whether to try
again; the caller gets parsed JSON, or a `RequestError` that names the problem in one line.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp

from megatron_oreal.config import HttpConfig
from megatron_oreal.observability.closing import Closing
from megatron_oreal.observability.event_loop import EventLoopThread
from megatron_oreal.types import Metrics

Result = TypeVar("Result")
MAX_ANSWER_BYTES = 2**20
MAX_PAUSE_SECONDS = 60.0  # longest pause before a retry, even if the server asks for more
MAX_SHOWN_CHARACTERS = 200  # of an answer, in an error
# Request timeout, too early, too many requests, and server errors; a retry does not help with other statuses.
PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)


COUNTED = ("requests", "retries", "failed", "cached")


class RequestError(Exception):
    """Signals that a request failed after all retries. The message is one line, without the API key."""


class PassingError(Exception):
    """Signals a failure that may not recur at the next attempt."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def read_api_key(setting: str, variable: str) -> str:
    """Returns the key, or "" if no variable is named. Raises ValueError, whose message never contains a key."""
    if not variable:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"{setting}.api_key_env: the environment variable {variable} is not set; export the key in it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(f"{setting}.api_key_env: {variable} holds blanks or characters that no API key has")
    return key


class JsonClient(Closing):
    """Sends requests to one address. Any thread may call `run`; the coroutines run on the client's own loop."""

    def __init__(self, address: str, config: HttpConfig, setting: str) -> None:
        """`setting` names the section of `config`, for errors. Raises ValueError for a missing API key."""
        self.address, self.config = address, config
        self.key = read_api_key(setting, config.api_key_env)
        self.counts: Counter[str] = Counter()  # since the last flush
        self.seconds = 0.0  # of all requests, retries and pauses included
        self.is_closed = False
        self.lock = threading.Lock()
        self.thread = EventLoopThread(setting)
        self.session: aiohttp.ClientSession | None = None  # it must be made on the loop that uses it
        self.slots: asyncio.Semaphore | None = None

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Returns the coroutine's result; after `close` it raises RuntimeError."""
        with self.lock:  # `close` cancels coroutines submitted before it
            if self.is_closed:
                coroutine.close()
                raise RuntimeError("the client of a reward server is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self.thread.loop)
        return future.result()

    async def post(self, body: object) -> Any:
        """Returns the JSON that the server answers with status 200. Raises RequestError after the last attempt."""
        if self.slots is None:
            self.slots = asyncio.Semaphore(self.config.max_concurrent_requests)
        data = json.dumps(body).encode()
        begin = time.monotonic()
        self.counts["requests"] += 1
        try:
            for attempt in range(self.config.max_retries + 1):
                try:
                    async with self.slots:
                        return await self._attempt(data)
                except PassingError as error:
                    if attempt == self.config.max_retries:
                        raise RequestError(f"{error} (attempt {attempt + 1}, the last)") from None
                    self.counts["retries"] += 1
                    backoff = self.config.retry_seconds * 2**attempt
                    await asyncio.sleep(min(max(backoff, error.retry_after), MAX_PAUSE_SECONDS))
            raise AssertionError("the last attempt returns or raises")
        finally:
            self.seconds += time.monotonic() - begin

    def flush_metrics(self, prefix: str) -> Metrics:
        """Returns the counts since the last call (requests, retries, failures, cached answers) and the mean time."""
        counts, self.counts = self.counts, Counter()
        seconds, self.seconds = self.seconds, 0.0
        metrics: Metrics = {f"{prefix}/num_{name}": counts[name] for name in COUNTED}
        if counts["requests"]:
            metrics[f"{prefix}/request_seconds_mean"] = seconds / counts["requests"]
        return metrics

    def close(self) -> None:
        """Cancels running requests; a thread that waits for one gets CancelledError."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
        self.thread.run(self._end())
        self.thread.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self.session is not None:
            await self.session.close()

    def _open_session(self) -> aiohttp.ClientSession:
        # The client neither requests nor unpacks compressed answers, because their size would have no bound.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.config.max_concurrent_requests),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self.config.timeout_seconds),
            headers=headers,
            auto_decompress=False,
        )

    async def _attempt(self, data: bytes) -> Any:
        if self.session is None:
            self.session = self._open_session()
        try:
            # The client refuses redirects, because they would send the key and the questions to another address.
            async with self.session.post(self.address, data=data, allow_redirects=False) as response:
                content = await self._read(response)
                if response.status != 200:
                    message = f"the server answered {response.status}: {self._shown(content)}"
                    if response.status in PASSING_STATUSES:
                        raise PassingError(message, retry_after_seconds(response.headers.get("Retry-After", "")))
                    raise RequestError(message)
        except asyncio.TimeoutError:
            raise PassingError(f"no answer within {self.config.timeout_seconds:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise PassingError(f"the request failed: {self._shown(str(error) or type(error).__name__)}") from None
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise PassingError(f"the answer is not JSON: {self._shown(content)}") from None

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        content = bytearray()
        async for part in response.content.iter_chunked(65536):
            content += part
            if len(content) > MAX_ANSWER_BYTES:
                raise PassingError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return bytes(content)

    def _shown(self, content: bytes | str) -> str:
        """Returns the beginning of an answer on one line, without the key, which an error of the server may repeat."""
        text = content.decode(errors="replace") if isinstance(content, bytes) else content
        if self.key:
            text = text.replace(self.key, "[key]")
        line = " ".join("".join(c if c.isprintable() else " " for c in text[: 4 * MAX_SHOWN_CHARACTERS]).split())
        return line[:MAX_SHOWN_CHARACTERS] or "nothing"


def retry_after_seconds(header: str) -> float:
    """Returns the seconds until a retry, from a number or a date; 0 for anything else."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
