"""Ports and GPUs: each goes to one server."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.servers.node import address_towards, assign_gpus, held_port, lock_folder

HOST = "127.0.0.1"


@contextmanager
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind((HOST, 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def free_ports() -> tuple[int, int]:
    """Three ports in a row."""
    for _ in range(100):
        with socket.socket() as server:
            server.bind((HOST, 0))
            first = server.getsockname()[1]
        try:
            for port in range(first, first + 3):
                with socket.socket() as server:
                    server.bind((HOST, port))
        except (OSError, OverflowError):
            continue
        return first, first + 2
    raise AssertionError("no three free ports")


def test_a_full_range_is_refused(free_ports: tuple[int, int]) -> None:
    with ExitStack() as stack:
        held = [stack.enter_context(held_port(HOST, free_ports))[0] for _ in range(3)]
        assert held == list(range(free_ports[0], free_ports[1] + 1))
        with pytest.raises(ValueError, match=r"rollout\.sglang\.ports: no port of \d+ to \d+ is free on 127.0.0.1"):
            stack.enter_context(held_port(HOST, free_ports))
    with held_port(HOST, free_ports) as (port, _):
        assert port == free_ports[0]  # given back


def test_where_somebody_listens_is_no_free_port() -> None:
    with listening() as port, pytest.raises(ValueError, match=r"rollout\.sglang\.ports"):
        with held_port(HOST, (port, port)):
            pass


def test_a_process_that_inherits_the_descriptor_keeps_the_port(free_ports: tuple[int, int]) -> None:
    with held_port(HOST, free_ports) as (port, descriptor):
        inherited = os.dup(descriptor)
    with held_port(HOST, free_ports) as (other, _):
        assert other == port + 1
    os.close(inherited)
    with held_port(HOST, free_ports) as (again, _):
        assert again == port


def take(ports: tuple[int, int], barrier: object, taken: multiprocessing.Queue[int]) -> None:
    with held_port(HOST, ports) as (port, _):
        taken.put(port)
        barrier.wait(60)  # type: ignore[attr-defined]


def test_processes_that_ask_at_once_get_different_ports(free_ports: tuple[int, int]) -> None:
    context = multiprocessing.get_context("fork")
    barrier, taken = context.Barrier(3), context.Queue()
    processes = [context.Process(target=take, args=(free_ports, barrier, taken)) for _ in range(3)]
    for process in processes:
        process.start()
    assert sorted(taken.get(timeout=60) for _ in processes) == list(range(free_ports[0], free_ports[1] + 1))
    for process in processes:
        process.join(60)


@pytest.mark.parametrize(("host", "message"), [("192.0.2.1", "no address of this node"), ("no host", "is no address")])
def test_a_strange_host_is_refused(host: str, message: str, free_ports: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.sglang\.host: .*{message}"), held_port(host, free_ports):
        pass


def test_the_way_to_a_host_has_an_address() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("::1") == "::1"


VISIBLE = ["4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("settings", "num_trainer_gpus", "expected"),
    [
        ({"num_servers": 2}, 2, [["6"], ["7"]]),
        ({"num_servers": 1, "tensor": 2}, 2, [["6", "7"]]),
        ({"num_servers": 1, "tensor": 3}, 1, [["5", "6", "7"]]),
        ({"num_servers": 2, "gpus": [3, 2]}, 2, [["7"], ["6"]]),
        ({"num_servers": 1, "gpus": [1, 2, 3]}, 1, [["5"]]),
        ({"num_servers": 2, "placement": "colocated"}, 2, [["4"], ["5"]]),
        ({"num_servers": 2, "tensor": 2, "placement": "colocated"}, 4, [["4", "5"], ["6", "7"]]),
        ({"num_servers": 2, "gpus": [1, 0], "placement": "colocated"}, 2, [["5"], ["4"]]),
        ({"num_servers": 4}, 0, [["4"], ["5"], ["6"], ["7"]]),
    ],
)
def test_gpus_are_dealt_out_in_order(
    settings: dict[str, object], num_trainer_gpus: int, expected: list[list[str]]
) -> None:
    assert assign_gpus(SglangConfig(**settings), num_trainer_gpus, VISIBLE) == expected


@pytest.mark.parametrize(
    ("settings", "num_trainer_gpus", "message"),
    [
        ({"num_servers": 3}, 2, r"3 GPUs, 2 are beside the trainer's \(this node has 4\): start fewer servers"),
        ({"num_servers": 2, "gpus": [3]}, 2, "need 2 GPUs, 1 are named"),
        ({"num_servers": 3, "placement": "colocated"}, 2, "need 3 GPUs, 2 are of the trainer"),
        ({"gpus": [2], "placement": "colocated"}, 2, "GPU 2 is not the trainer's; name those of its 2 processes"),
        ({"gpus": [4]}, 1, r"gpus=\[4\] must be different numbers below 4, the GPUs of this node"),
        ({"num_servers": 2, "gpus": [2, 2]}, 1, "must be different numbers"),
        ({"gpus": [1]}, 2, "the trainer itself has GPU 1; name others, or set placement=colocated"),
    ],
)
def test_gpus_that_are_not_there_are_refused(settings: dict[str, object], num_trainer_gpus: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"rollout\.sglang.*{message}"):
        assign_gpus(SglangConfig(**settings), num_trainer_gpus, VISIBLE)


def test_locks_lie_in_a_private_folder(
    free_ports: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with held_port(HOST, free_ports) as (port, _):
        [folder] = tmp_path.iterdir()
        assert folder.name == f"megatron-oreal-{os.getuid()}" and folder.stat().st_mode & 0o777 == 0o700
        assert [file.name for file in folder.iterdir()] == [f"port-{port}.lock"]
    (tmp_path / "session").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "session"))
    assert lock_folder() == tmp_path / "session" / "megatron-oreal"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert lock_folder() == folder


def test_a_folder_that_another_user_has_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    name = f"megatron-oreal-{os.getuid()}"
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / f"{name}-1").write_text("")
    (tmp_path / f"{name}-2").mkdir()
    (tmp_path / f"{name}-2").chmod(0o770)  # others can change it
    if os.getuid() == 0:
        (tmp_path / f"{name}-3").mkdir(mode=0o700)
        os.chown(tmp_path / f"{name}-3", 65534, 65534)
    else:
        (tmp_path / f"{name}-3").write_text("")
    assert lock_folder() == tmp_path / f"{name}-4"
    for number in range(4, 10):
        (tmp_path / f"{name}-{number}").mkdir(exist_ok=True)
        (tmp_path / f"{name}-{number}").chmod(0o777)
    found = lock_folder()
    assert found.name.startswith(f"{name}-") and found.stat().st_mode & 0o777 == 0o700


def test_a_lock_that_cannot_be_opened_is_a_taken_port(free_ports: tuple[int, int]) -> None:
    lock = lock_folder() / f"port-{free_ports[0]}.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to("/dev/null")
    try:
        with held_port(HOST, free_ports) as (port, _):
            assert port == free_ports[0] + 1
    finally:
        lock.unlink()
