"""How ranks find each other: by a file on one machine, by one address elsewhere."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_oreal.parallel import rendezvous
from megatron_oreal.parallel.rendezvous import (
    LOOPBACK_INTERFACE,
    address_to_listen_on,
    clear_traffic,
    is_on_one_node,
    listening_store,
    stay_on_loopback,
)
from tests.support.listening import listeners_of_tree
from tests.support.paths import ROOT

TIMEOUT = timedelta(seconds=20)
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHERS, rendezvous.STORE_FILE):
        monkeypatch.delenv(name, raising=False)


def test_nodes_are_told_from_the_variables() -> None:
    assert is_on_one_node({})
    assert is_on_one_node({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    assert not is_on_one_node({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert not is_on_one_node({"RANK": "1", "WORLD_SIZE": "2"})


def test_on_one_node_sockets_stay_on_loopback() -> None:
    environment: dict[str, str] = {}
    stay_on_loopback(environment=environment)
    assert environment == {"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE, "NCCL_SOCKET_IFNAME": LOOPBACK_INTERFACE}
    environment = {"GLOO_SOCKET_IFNAME": "eth1"}
    stay_on_loopback(has_servers_elsewhere=True, environment=environment)
    assert environment == {"GLOO_SOCKET_IFNAME": "eth1"}, "the user's word counts"
    several = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    environment = dict(several)
    stay_on_loopback(environment=environment)
    assert environment == several


def test_several_nodes_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    assert clear_traffic() == []
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    [line] = clear_traffic()
    assert line.startswith("Warning: ") and line.endswith("use a network that you trust")


def test_a_store_listens_on_one_address_alone() -> None:
    store = listening_store("127.0.0.1", 0, 2, TIMEOUT)
    found = {str(each.address) for each in listeners_of_tree(os.getpid()) if each.port == store.port}
    assert found == {"127.0.0.1"}
    dist.TCPStore("127.0.0.1", store.port, 2, False, TIMEOUT).set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(ValueError, match=rf"cannot listen on 127\.0\.0\.1, port {store.port} \(Address already in use"):
        listening_store("127.0.0.1", store.port, 2, TIMEOUT)
    with pytest.raises(ValueError, match=r"MASTER_ADDR, MASTER_PORT: the first rank cannot listen on 192\.0\.2\.77"):
        listening_store("192.0.2.77", 0, 2, TIMEOUT)


def test_a_nodes_own_name_may_be_a_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_to_listen_on("localhost") in ("127.0.0.1", "::1")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 1))
        outside = probe.getsockname()[0]
    # What is written as loopback is meant: all ranks of this "node" and the next are on one machine.
    assert address_to_listen_on("127.0.0.1") == "127.0.0.1" and address_to_listen_on("localhost") in (
        "127.0.0.1",
        "::1",
    )
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *_args, **_options: [entry])
    assert address_to_listen_on("node1") == outside


RANK = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from megatron_oreal.parallel.rendezvous import rendezvous, stay_on_loopback
timeout = timedelta(seconds=60)
stay_on_loopback()
dist.init_process_group("gloo", timeout=timeout, **rendezvous(timeout))
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
from tests.support.listening import listeners_of_tree
from tests.support.paths import ROOT
import os
print(value.item(), sorted({str(each.address) for each in listeners_of_tree(os.getpid())}))
dist.barrier()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("by", ["file", "srun"])
def test_ranks_of_one_node_meet(tmp_path: Path, by: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    if by == "file":
        common |= {rendezvous.STORE_FILE: str(tmp_path / "store")}
    else:  # the name of this node is not looked at: its ranks are all here
        common |= {"MASTER_ADDR": "a-name-that-nobody-knows", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert said == ["3.0 ['127.0.0.1']\n"] * 2
