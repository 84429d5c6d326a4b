"""Sends the HTTP requests of a push with their deadlines, for all weight transports."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, field
from typing import Any, Generic

from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, ServerRefusal, SglangClient
from megatron_oreal.parallel.collectives import Result

POLL_SECONDS = 0.001  # between two checks of a collective and of the servers' answers
EXPLANATION_SECONDS = 5.0  # for servers to report why a collective failed
CLEAN_UP_SECONDS = 5.0  # for requests whose failure does no harm


class WeightSyncError(ServerError):
    """A push has failed. The message names the version, the servers and their answers."""

    def __init__(self, message: str, urls: Sequence[str] = ()) -> None:  # unpickling passes only the message
        super().__init__(message)
        self.urls = list(urls)  # the failing servers: those without an answer, or otherwise those that refused


@dataclass(slots=True)
class Deadline:
    """The time by which a push must end."""

    seconds: float
    begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Returns the remaining seconds; never 0, which would mean no timeout."""
        return max(0.01, self.begin + self.seconds - time.monotonic())

    def has_passed(self) -> bool:
        return time.monotonic() > self.begin + self.seconds


class Requests:
    """Sends one request to each server, all concurrently on the event loop."""

    def __init__(self, loop: EventLoopThread, coroutines: Mapping[SglangClient, Coroutine[Any, Any, Any]]) -> None:
        self.futures: dict[SglangClient, Future[Any]] = {
            client: asyncio.run_coroutine_threadsafe(coroutine, loop.loop) for client, coroutine in coroutines.items()
        }

    def answers(self) -> dict[SglangClient, Any]:
        """Waits for all answers. Raises WeightSyncError as soon as one of them is an error."""
        wait(self.futures.values(), return_when=FIRST_EXCEPTION)
        self.check()
        return {client: future.result() for client, future in self.futures.items()}

    def check(self) -> None:
        """Raises WeightSyncError if one of the answers so far is an error."""
        errors = {client.endpoint.url: error for client in self.answered() if (error := self._error(client))}
        if errors:
            silent = [url for url, error in errors.items() if not isinstance(error, ServerRefusal)]
            raise WeightSyncError("; ".join(map(str, errors.values())), silent or list(errors))

    def _error(self, client: SglangClient) -> ServerError | None:
        error = self.futures[client].exception()
        if error is not None and not isinstance(error, ServerError):
            raise error
        return error

    def answered(self) -> list[SglangClient]:
        return [client for client, future in self.futures.items() if future.done()]

    def silent(self) -> list[str]:
        return [client.endpoint.url for client, future in self.futures.items() if not future.done()]

    def urls(self) -> list[str]:
        return [client.endpoint.url for client in self.futures]

    def explain(self, failure: Exception) -> WeightSyncError:
        """Returns the error of a failed collective, with the reasons that the servers report."""
        wait(self.futures.values(), EXPLANATION_SECONDS, FIRST_EXCEPTION)
        try:
            self.check()
        except WeightSyncError as error:
            return error
        urls = self.silent() or self.urls()
        reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
        return WeightSyncError(f"SGLang server {', '.join(urls)}: {reason}", urls)


class Collective(Generic[Result]):
    """Runs a collective operation with servers in a thread, because it would hang if a server has refused it.

    `requests` are those that make the servers take part.
    """

    def __init__(self, action: Callable[[], Result], requests: Requests) -> None:
        self.requests = requests
        self.results: list[Result] = []
        self.failures: list[Exception] = []
        self.thread = threading.Thread(target=self._run, args=(action,), name="weight-sync", daemon=True)
        self.thread.start()

    def _run(self, action: Callable[[], Result]) -> None:
        try:
            self.results.append(action())
        except RuntimeError as failure:  # torch.distributed raises RuntimeErrors
            self.failures.append(failure)

    def result(self, deadline: Deadline) -> Result:
        """Waits for the operation, but not for the servers' answers.

        Raises WeightSyncError if it fails, if a server refuses, and after the deadline.
        """
        while self.thread.is_alive():
            self.requests.check()
            if deadline.has_passed():
                urls = self.requests.silent() or self.requests.urls()
                raise WeightSyncError(f"SGLang server {', '.join(urls)} got no further in {deadline.seconds:g} s", urls)
            self.thread.join(POLL_SECONDS)
        if self.failures:
            raise self.requests.explain(self.failures[0]) from self.failures[0]
        assert self.results, "the thread died of an error that is not torch.distributed's"
        return self.results[0]
