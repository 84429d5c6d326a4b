"""Implements the common part of the weight transports, which send a weight stream to SGLang servers.

A push is collective. Every trainer rank calls it and consumes the stream, whose tensors are whole on every rank; the
ranks that have clients send. It fails on all ranks or on none. After a failed push a server may have old, new or mixed
weights, so the engine must not generate until another push has succeeded.

Servers must be paused or idle. A generating server delays the push until its responses end. The engine pauses servers
with "abort" or "retract"; with "in_place" they could not flush their cache, and would refuse the push.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megatron_oreal.engines.sglang.client import EventLoopThread, ServerRefusal, SglangClient
from megatron_oreal.engines.sglang.weight_labels import label_of, run_of
from megatron_oreal.engines.sglang.weights.requests import Deadline, Requests, WeightSyncError
from megatron_oreal.parallel.collectives import Result, all_gather_object, raise_on_all
from megatron_oreal.weights.fingerprint import MeasuredStream, drain
from megatron_oreal.weights.stream_filters import Stream


class WeightTransport(Protocol):
    run_id: str  # of the sending run, the same on all ranks

    def push(self, stream: Stream, version: int, clients: Sequence[SglangClient]) -> None:
        """Collective. `clients`: this rank's servers, see `clients_of_rank`. Raises WeightSyncError."""

    def forget(self, client: SglangClient) -> None:
        """Drops the agreements with a server that has died or restarted."""

    def close(self) -> None: ...


def clients_of_rank(clients: Sequence[Result], rank: int, num_senders: int) -> list[Result]:
    """Returns the servers that a trainer rank sends to; the first `num_senders` ranks divide the servers."""
    return list(clients[rank::num_senders]) if rank < num_senders else []


class ServerTransport(ABC):
    """Implements what every push needs: the timeout, the checks, and the same result on all ranks."""

    def __init__(self, loop: EventLoopThread, timeout_seconds: float, check_weights: bool = False) -> None:
        self.loop, self.timeout_seconds = loop, timeout_seconds
        self.checksums = Checksums() if check_weights else None
        self.run_id = ""  # part of the label of the servers' weights
        # Servers of older releases, which have no requests to begin and end an update
        self.without_session: set[SglangClient] = set()

    def push(self, stream: Stream, version: int, clients: Sequence[SglangClient]) -> None:
        deadline = Deadline(self.timeout_seconds)
        measured = MeasuredStream.of(stream, has_fingerprint=self.checksums is not None)
        tensors = iter(measured)
        failure: WeightSyncError | None = None
        try:
            self.send(tensors, version, clients, deadline)
            self.check_version(version, clients, deadline)
        except WeightSyncError as error:
            failure = error
        drain(tensors)
        raise_push_failure(failure, f"weights of version {version}: ")
        if self.checksums is not None:
            self.check_weights(measured.fingerprint, version, clients, deadline)

    @abstractmethod
    def send(
        self, tensors: Iterator[tuple[str, Tensor]], version: int, clients: Sequence[SglangClient], deadline: Deadline
    ) -> None:
        """Sends one pass of the stream to this rank's servers. The caller consumes the rest of the pass.

        Raises WeightSyncError. On a rank without clients it raises only when another rank raises too.
        """

    def forget(self, client: SglangClient) -> None:
        self.without_session.discard(client)

    def close(self) -> None:  # noqa: B027  # most transports have nothing to close
        pass

    def post(self, path: str, bodies: Mapping[SglangClient, dict[str, Any]], deadline: Deadline) -> Requests:
        """Sends a request to each client, and returns before the answers."""
        seconds = deadline.left()
        return Requests(self.loop, {client: client.control(path, body, seconds) for client, body in bodies.items()})

    def begin(self, clients: Sequence[SglangClient], deadline: Deadline) -> None:
        Requests(self.loop, {client: self._begin(client, deadline) for client in clients}).answers()

    async def _begin(self, client: SglangClient, deadline: Deadline) -> None:
        if client in self.without_session:
            return
        try:
            await client.control("/begin_weight_update", {}, deadline.left())
        except ServerRefusal as refusal:
            if refusal.status == 404:
                self.without_session.add(client)
                return
            if refusal.status != 400:
                raise
            # Status 400: a push that failed, or whose sender died, has left its session open.
            await client.control("/end_weight_update", {}, deadline.left())
            await client.control("/begin_weight_update", {}, deadline.left())

    def end(self, clients: Sequence[SglangClient], deadline: Deadline) -> None:
        with_session = [client for client in clients if client not in self.without_session]
        self.post("/end_weight_update", {client: {} for client in with_session}, deadline).answers()

    def label(self, version: int) -> str:
        return label_of(self.run_id, version)

    def check_version(self, version: int, clients: Sequence[SglangClient], deadline: Deadline) -> None:
        requests = Requests(self.loop, {client: client.get("/model_info", deadline.left()) for client in clients})
        for client, info in requests.answers().items():
            if (found := info.get("weight_version")) != self.label(version):
                raise WeightSyncError(
                    f"SGLang server {client.endpoint} reports {found}{whose(str(found), self.run_id)}",
                    [client.endpoint.url],
                )

    def check_weights(
        self, fingerprint: str, version: int, clients: Sequence[SglangClient], deadline: Deadline
    ) -> None:
        """Collective. Checks that all servers hold the same weights, which changed if the stream has changed."""
        assert self.checksums is not None
        failure, found = None, {}
        try:
            answers = self.post("/weights_checker", {client: {"action": "checksum"} for client in clients}, deadline)
            found = {client.endpoint.url: checksum_of(answer) for client, answer in answers.answers().items()}
        except WeightSyncError as error:
            failure = error
        raise_push_failure(failure, f"weights of version {version}: ")
        everywhere = {url: checksum for of_rank in all_gather_object(found) for url, checksum in of_rank.items()}
        self.checksums.compare(fingerprint, everywhere, version)


def whose(label: str, run_id: str) -> str:
    other = run_of(label)
    return " of another run: each run needs servers of its own" if other and run_id and other != run_id else ""


def checksum_of(answer: dict[str, Any]) -> str:
    """Returns one checksum for the tensors of all ranks of a server."""
    return hashlib.sha256("".join(rank["per_gpu_checksum"] for rank in answer["ranks"]).encode()).hexdigest()


@dataclass(slots=True)
class Checksums:
    """The checksums of the last push, for comparison with the next one."""

    fingerprint: str = ""  # of the pushed stream
    of_server: dict[str, str] = field(default_factory=dict)  # URL -> checksum of the weights on the server

    def compare(self, fingerprint: str, found: dict[str, str], version: int) -> None:
        """Raises WeightSyncError for servers that differ from most, or whose weights changed when they should not.

        found: the servers' checksums by URL, after a push of the stream with this fingerprint.
        """
        values = list(found.values())
        common = max(set(values), key=values.count) if values else ""
        odd = [url for url, checksum in found.items() if checksum != common]
        if odd:
            raise WeightSyncError(
                f"weights of version {version}: SGLang server {', '.join(odd)} holds others than most servers", odd
            )
        for url, checksum in found.items():
            before = self.of_server.get(url)
            if before is not None and (before == checksum) != (self.fingerprint == fingerprint):
                what = "stayed as they were" if before == checksum else "changed although the same were sent"
                raise WeightSyncError(f"weights of version {version}: those of SGLang server {url} {what}", [url])
        self.fingerprint, self.of_server = fingerprint, found


def raise_push_failure(failure: WeightSyncError | None, prefix: str = "") -> None:
    """Collective. Raises one error on every rank, made of the errors of all ranks; `prefix` begins its message."""

    def merge(failures: Sequence[WeightSyncError]) -> WeightSyncError:
        message = "; ".join(dict.fromkeys(map(str, failures)))
        return WeightSyncError(prefix + message, list(dict.fromkeys(url for met in failures for url in met.urls)))

    raise_on_all(failure, merge)
