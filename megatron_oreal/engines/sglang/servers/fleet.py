"""Starts, watches, replaces and ends the SGLang servers of a run. Each server has its own keys."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import ServerError
from megatron_oreal.engines.sglang.endpoints import (
    Endpoint,
    check_replaceable,
    read_endpoints,
    remove_endpoints,
    write_endpoints,
)
from megatron_oreal.engines.sglang.servers.answers import answer, key_status
from megatron_oreal.engines.sglang.servers.encryption import clear_traffic, is_loopback
from megatron_oreal.engines.sglang.servers.listening import open_addresses
from megatron_oreal.engines.sglang.servers.node import assign_gpus, check_gpus_are_free
from megatron_oreal.engines.sglang.servers.process import (
    END_SECONDS,
    GRACE_SECONDS,
    ServerProcess,
    ServerSettings,
    check_flags,
    check_python,
    launch_server,
)
from megatron_oreal.engines.sglang.servers.router import Router
from megatron_oreal.types import Notify

POLL_SECONDS = 0.5
TELL_SECONDS = 30.0  # between two log lines about a server that starts
NUM_PORT_ATTEMPTS = 3  # another process may take a port between our check and the server's start
PORT_TAKEN = "address already in use"


class ServerFleet:
    """The servers of a run: those that this process has started, on their `gpus`, and those started elsewhere.

    Its own servers are numbered from `first_index` on. Any thread may call the methods.
    """

    def __init__(
        self, settings: ServerSettings, gpus: Sequence[Sequence[str]], notify: Notify, first_index: int = 0
    ) -> None:
        self.settings, self.gpus, self.notify, self.first_index = settings, gpus, notify, first_index
        self.file: Path | None = None  # the file that names the servers
        self.endpoints: list[Endpoint] = []
        self.elsewhere: Sequence[Endpoint] = ()
        self.processes: dict[Endpoint, ServerProcess] = {}
        self.router: Router | None = None  # set if config.router is set
        self.num_restarts = 0
        self.lock = threading.Lock()
        self.is_closing = threading.Event()

    def is_alive(self, endpoint: Endpoint) -> bool:
        """Says whether our server's process is still running; True for a server that was started elsewhere."""
        process = self.processes.get(endpoint)
        return process.is_running if process is not None else endpoint in self.elsewhere

    def candidates(self, endpoint: Endpoint) -> list[Endpoint]:
        """Returns where a server of `endpoints_file` may be: its old address, and those that the file now names.

        Returns none for a server that this fleet restarts itself, or that nobody restarts.
        """
        file = self.settings.config.endpoints_file
        if file is None or endpoint in self.processes:
            return []
        try:
            named = read_endpoints(file)
        except ValueError:  # the servers of the file are starting
            named = []
        return [endpoint, *(other for other in named if other != endpoint)]

    def pid(self, endpoint: Endpoint) -> int:
        """Returns the process id of a server that this fleet has started."""
        return self.processes[endpoint].pid

    def log_tail(self, endpoint: Endpoint, num_lines: int = 20) -> str:
        """Returns the last lines of the server's log; empty for a server that was started elsewhere."""
        process = self.processes.get(endpoint)
        return "\n".join(process.tail(num_lines)) if process is not None else ""

    def start(self) -> None:
        """Starts all servers concurrently and returns when each has answered."""
        config = self.settings.config
        self.notify(f"waiting for {config.num_servers} SGLang server{'s' * (config.num_servers > 1)} ...")
        with ThreadPoolExecutor(config.num_servers, "sglang-start") as pool:
            futures = [pool.submit(self.start_one, self.first_index + number) for number in range(config.num_servers)]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.is_closing.set()  # ends the waits for the other servers
                raise
        self.endpoints = [future.result() for future in futures]

    def publish(self, file: Path, elsewhere: Sequence[Endpoint] = ()) -> None:
        """Writes `file`, which names our servers and those `elsewhere`, and starts the router if one is configured."""
        self.elsewhere = elsewhere
        self.endpoints = [*self.endpoints, *elsewhere]
        if self.settings.config.router:
            self.router = Router(self.settings, self.endpoints)
        self.file = file
        write_endpoints(file, self.endpoints)
        self.warn_of_clear_traffic()

    def warn_of_clear_traffic(self) -> None:
        if (warning := clear_traffic(self.endpoints, self.settings.config)) is not None:
            self.notify(warning)

    def restart(self, endpoint: Endpoint, keeps_keys: bool = False) -> Endpoint:
        """Ends the remains of a server and starts a new one, with other keys and on another port.

        `keeps_keys`: the new server has the same keys, for clients elsewhere that know them. The function returns when
        the new server answers; that server has the weights of `model_path`. Raises ServerError if
        rollout.sglang.max_restarts is reached, or if another process has started the server.
        """
        with self.lock:
            if endpoint not in self.processes:
                is_colocated = self.settings.config.placement == "colocated"
                rest = "the run goes on without it" if is_colocated else "start it again there"
                raise ServerError(f"SGLang server {endpoint} was started elsewhere: {rest}")
            process = self.processes.pop(endpoint)
        process.end_now()
        reason = f"its log: {process.log}"
        while True:
            with self.lock:
                if self.num_restarts >= self.settings.config.max_restarts:
                    self.endpoints = [other for other in self.endpoints if other != endpoint]
                    raise ServerError(
                        f"SGLang server {endpoint} has died, and the {self.num_restarts} restarts of "
                        f"rollout.sglang.max_restarts are spent; {reason}"
                    )
                self.num_restarts += 1
            self.notify(f"SGLang server {endpoint} is started again ({reason})")
            try:
                started = self.start_one(process.index, endpoint if keeps_keys else None)
            except ServerError as error:
                if self.is_closing.is_set():
                    raise
                reason = str(error)
                continue
            with self.lock:
                self.endpoints = [started if other == endpoint else other for other in self.endpoints]
                if self.file is not None:
                    write_endpoints(self.file, self.endpoints)
            if self.router is not None:
                self.router.replace(endpoint, started)
            return started

    def start_one(self, index: int, before: Endpoint | None = None) -> Endpoint:
        """Starts one server and waits until it answers. `before`: the server whose keys it takes.

        Raises ServerError if the server ends or does not answer in time, ValueError for a wrong flag.
        """
        for attempt in range(NUM_PORT_ATTEMPTS):
            process = launch_server(self.settings, index, self.gpus[index - self.first_index], before)
            with self.lock:
                self.processes[process.endpoint] = process
            begin = time.monotonic()
            try:
                self.wait_until_healthy(process)
            except BaseException as error:
                with self.lock:
                    self.processes.pop(process.endpoint, None)
                process.end_now()
                if isinstance(error, PortTaken) and attempt + 1 < NUM_PORT_ATTEMPTS:
                    continue
                raise
            self.notify(f"SGLang server {process.endpoint} is ready after {time.monotonic() - begin:.0f} s")
            if is_loopback(self.settings.config.host) and (found := open_addresses(process.pid)):
                self.notify(
                    f"Warning: SGLang server {process.endpoint} also listens on {', '.join(found)}, where the network "
                    "reaches it: drop the flag of rollout.sglang.flags that opens it"
                )
            return process.endpoint
        raise AssertionError("the last attempt has raised")

    def wait_until_healthy(self, process: ServerProcess) -> None:
        timeout_seconds = self.settings.config.start_timeout_seconds
        begin = time.monotonic()
        deadline, next_line = begin + timeout_seconds, begin + TELL_SECONDS
        name = f"SGLang server {process.index} ({process.endpoint})"
        # Only our own process may receive a key, and until the server listens, anybody may listen on its port.
        while not (process.listens() and has_answered(process.endpoint)):
            if self.is_closing.wait(POLL_SECONDS):
                raise ServerError(f"{name} was stopped while it started")
            # SGLang does not exit by itself in this case
            if any(PORT_TAKEN in line.lower() for line in process.tail(100)):
                raise PortTaken(f"{name}: its port was taken by another process; its log: {process.log}")
            if not process.is_running:
                self.explain(process, name)
            if time.monotonic() > next_line:
                next_line += TELL_SECONDS
                self.notify(
                    f"{name} is not ready after {time.monotonic() - begin:.0f} s, of at most "
                    f"rollout.sglang.start_timeout_seconds={timeout_seconds:g}; its log: {process.log}"
                )
            if time.monotonic() > deadline:
                self.notify("\n".join(process.tail(20)))
                raise ServerError(
                    f"{name} did not answer within rollout.sglang.start_timeout_seconds={timeout_seconds:g}; "
                    f"its log: {process.log}"
                )
        if answer(process.endpoint, "/model_info", "")[0] != 401:
            raise ServerError(f"{name} does not ask for its key; use another release of SGLang")

    def explain(self, process: ServerProcess, name: str) -> NoReturn:
        """Raises the error of a server that has ended during its start."""
        exit_status = process.supervisor.wait()
        lines = process.tail(20)
        if exit_status == 2 and lines and lines[-1].startswith("SGLang: "):
            raise ValueError(f"rollout.sglang.flags: {lines[-1].removeprefix('SGLang: ')}")
        self.notify("\n".join(lines))
        raise ServerError(
            f"{name} ended while it started (exit status {exit_status}): {process.cause()}; its log: {process.log}"
        )

    def close(self) -> None:
        """Ends all servers that this fleet has started, and returns when their processes have ended."""
        self.is_closing.set()
        with self.lock:
            processes = list(self.processes.values())
            self.processes.clear()
            self.endpoints = []
        if self.router is not None:
            self.router.close()
        for process in processes:
            process.ask_to_end()
        for process in processes:
            process.end(GRACE_SECONDS[self.settings.device_type] + END_SECONDS)
        if self.file is not None:
            remove_endpoints(self.file)


class PortTaken(ServerError):
    pass


def check_router(config: SglangConfig, endpoints: Sequence[Endpoint]) -> None:
    if config.router and any(endpoint.certificate for endpoint in endpoints):
        raise ValueError(
            "rollout.sglang.router: sglang-router cannot check certificates, and the servers of "
            f"{config.endpoints_file} have some: drop router, or serve with rollout.sglang.tls=false"
        )


def has_answered(endpoint: Endpoint) -> bool:
    """Says whether this server generates. Another server of ours on its port would refuse the key."""
    return key_status(endpoint) == 200 and answer(endpoint, "/health", "")[0] == 200


@contextmanager
def open_servers(settings: ServerSettings, notify: Notify) -> Iterator[ServerFleet]:
    """Returns the servers of `endpoints_file`, or starts servers that end with the block.

    The started servers are healthy when the block begins, are named in RUN_DIR/servers.json, and write to
    RUN_DIR/servers/server_<n>.log. Raises ValueError for an invalid setting, ServerError for a server that does not
    start. `notify` receives lines for the user.
    """
    config = settings.config
    if config.endpoints_file is not None:
        fleet = ServerFleet(settings, [], notify)
        fleet.endpoints = fleet.elsewhere = read_endpoints(config.endpoints_file)
        check_router(config, fleet.endpoints)
        fleet.warn_of_clear_traffic()
        try:
            if config.router:
                check_python(config.python)
                fleet.router = Router(settings, fleet.endpoints)
            yield fleet
        finally:
            fleet.close()
        return
    check_replaceable(settings.run_dir / "servers.json")
    with start_servers(settings, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), notify) as fleet:
        fleet.publish(settings.run_dir / "servers.json")
        yield fleet


@contextmanager
def start_servers(
    settings: ServerSettings, num_trainer_gpus: int, notify: Notify, first_index: int = 0
) -> Iterator[ServerFleet]:
    """Starts servers without naming them in a file. See `open_servers`."""
    config = settings.config
    check_flags(config.flags)
    check_python(config.python)
    gpus: list[list[str]] = [[]] * config.num_servers
    if settings.device_type == "cuda":
        gpus = assign_gpus(config, num_trainer_gpus, visible_gpus())
        if config.placement == "disaggregated":
            check_gpus_are_free([gpu for each in gpus for gpu in each])
    fleet = ServerFleet(settings, gpus, notify, first_index)
    try:
        fleet.start()
        yield fleet
    finally:
        fleet.close()


def visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (
        [str(gpu) for gpu in range(torch.cuda.device_count())] if named is None else [*filter(None, named.split(","))]
    )


def serve_until_stopped(settings: ServerSettings, notify: Notify) -> None:
    """Serves a trainer that runs elsewhere, until Ctrl-C or SIGTERM.

    `endpoints_file` or RUN_DIR/servers.json names the servers. A server that ends is restarted with its keys, at most
    `max_restarts` times, and the file then names its new address. Raises ServerError if the last one has ended.
    """
    config, run_dir = settings.config, settings.run_dir
    if config.placement == "colocated":
        raise ValueError("rollout.sglang.placement=colocated: the trainer starts such servers itself")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_serving)
    file = config.endpoints_file or run_dir / "servers.json"
    check_replaceable(file)
    with start_servers(settings, num_trainer_gpus=0, notify=notify) as fleet:
        fleet.publish(file)
        notify(f"serving; the trainer's setting: rollout.sglang.endpoints_file={file.resolve()}")
        living = list(fleet.endpoints)
        while living:
            time.sleep(POLL_SECONDS)
            for endpoint in [endpoint for endpoint in living if not fleet.is_alive(endpoint)]:
                living.remove(endpoint)
                notify(f"SGLang server {endpoint} has died; the end of its log:\n{fleet.log_tail(endpoint)}")
                try:
                    living.append(fleet.restart(endpoint, keeps_keys=True))
                except ServerError as error:
                    notify(str(error))
        raise ServerError(f"all SGLang servers have died; their logs: {run_dir / 'servers'}")


def stop_serving(_signal_number: int, _frame: FrameType | None) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the end of the servers
    sys.exit(0)
