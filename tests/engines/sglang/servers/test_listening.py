"""Who listens: a key is only sent to a server that is proven to be ours."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path

import pytest

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet
from megatron_oreal.engines.sglang.servers.listening import (
    Listener,
    listeners,
    read_row,
    stranger_listens,
    tree_listens,
)
from megatron_oreal.engines.sglang.servers.process import ServerSettings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LISTENING = """
import socket, sys, time
listening = socket.create_server((sys.argv[1], int(sys.argv[2])))
print(listening.getsockname()[1], flush=True)
time.sleep(600)
"""
NOBODY = 65534


@contextmanager
def listening_process(host: str) -> Iterator[tuple[int, int]]:
    """Gives the id and the port of another process that listens."""
    command = [sys.executable, "-c", LISTENING, host, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.pid, int(process.stdout.readline())
        finally:
            process.kill()


def test_rows_are_read() -> None:
    row = "  2: {}:7918 00000000:0000 {} 00000000:00000000 00:00000000 00000000  1000        0 35137 1 0"
    expected = Listener(ip_address("127.0.0.1"), 31000, 1000, 35137)
    assert read_row(row.format("0100007F", "0A")) == expected
    assert read_row(row.format("0100007F", "01")) is None
    assert read_row(row.format("0000000000000000FFFF00000100007F", "0A")) == expected
    loopback = read_row(row.format("00000000000000000000000001000000", "0A"))
    assert loopback is not None and loopback.address == ip_address("::1")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_tree_listens_itself(host: str) -> None:
    with listening_process(host) as (process, port):
        assert tree_listens(process, "127.0.0.1", port)
        assert tree_listens(os.getpid(), "localhost", port)  # it is a child
        assert not tree_listens(process, "127.0.0.1", port + 1)
        with subprocess.Popen(["sleep", "60"]) as other:
            assert not tree_listens(other.pid, "127.0.0.1", port)
            other.kill()
        assert not stranger_listens("127.0.0.1", port)
    assert not tree_listens(os.getpid(), "127.0.0.1", port)


def test_a_tree_that_has_ended_listens_nowhere() -> None:
    """A server that crashed while it started must not pass for one on a system that cannot tell."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended, socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert tree_listens(ended.pid, "127.0.0.1", port) is False  # nobody has waited for it yet
        ended.wait()
        assert tree_listens(ended.pid, "127.0.0.1", port) is False


def test_all_listeners_are_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port = ours.getsockname()[1]
        found = [listener for listener in listeners() or [] if listener.port == port]
        assert [(str(each.address), each.user) for each in found] == [("127.0.0.1", os.getuid())]
        assert os.fstat(ours.fileno()).st_ino == found[0].inode


class Stranger(ThreadingHTTPServer):
    """Says yes to everything, as a user who waits for keys does."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.heard: list[str] = []
        super().__init__(address, Yes)


class Yes(BaseHTTPRequestHandler):
    server: Stranger

    def do_GET(self) -> None:
        self.server.heard += [str(self.headers), self.path]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def stranger(port: int) -> Iterator[Stranger]:
    with Stranger(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


STAND_IN = """#!{python}
# Stands in for the supervisor and a server that loads its model for ever.
import json, os, sys, time
sys.stdin.readline()
print(json.dumps({{"pid": os.getpid()}}), flush=True)
time.sleep(600)
"""


def test_a_stranger_on_the_port_of_a_starting_server_learns_no_key(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    python.chmod(0o700)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config = SglangConfig(python=python, ports=(port, port + 20), start_timeout_seconds=2)
    fleet = ServerFleet(ServerSettings(config, tmp_path, "float32", tmp_path, "cpu", 16), [[]], print)
    heard: list[str] = []

    def listen() -> None:
        while not fleet.processes:
            pass
        [endpoint] = fleet.processes
        with stranger(int(endpoint.url.rpartition(":")[2])) as server:
            done.wait(60)
            heard.extend(server.heard)

    done = threading.Event()
    thread = threading.Thread(target=listen)
    thread.start()
    try:
        with pytest.raises(ServerError, match=r"did not answer within rollout\.sglang\.start_timeout_seconds=2"):
            fleet.start()
    finally:
        done.set()
        thread.join()
        fleet.close()
    assert heard == []


def listen_as_nobody(ports: multiprocessing.Queue[int]) -> None:
    os.setuid(NOBODY)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ports.put(listening.getsockname()[1])
        time.sleep(600)


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become another user")
def test_another_user_where_a_server_was_gets_no_key() -> None:
    context = multiprocessing.get_context("fork")
    ports: multiprocessing.Queue[int] = context.Queue()
    nobody = context.Process(target=listen_as_nobody, args=(ports,))
    nobody.start()
    loop = EventLoopThread("test")
    client = None
    try:
        port = ports.get(timeout=60)
        assert stranger_listens("127.0.0.1", port) and stranger_listens("localhost", port)
        client = SglangClient(Endpoint(f"http://127.0.0.1:{port}", "key", "admin"))
        with pytest.raises(ServerError, match="is gone: another user of this machine listens there"):
            loop.run(client.get("/model_info", 5))
    finally:
        nobody.kill()
        nobody.join()
        if client is not None:
            loop.run(client.close())
        loop.close()
