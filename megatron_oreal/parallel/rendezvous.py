"""Connects the ranks of a run with each other, so that no process outside of the run can take part.

What ranks exchange when they start is trusted: addresses, and state that torch's launcher unpickles. torch's own TCP
store has no key and listens on all interfaces. Here the ranks that `megatron-oreal` starts on one machine share a file
in a private folder, and gloo and NCCL use the loopback interface there. On several nodes the store listens on one
address, MASTER_ADDR, and the network has to be trusted.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

STORE_FILE = "MEGATRON_OREAL_STORE"  # the launcher's word to its workers: the file that they share
LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo" if sys.platform == "linux" else "lo0"


def is_on_one_node(environment: Mapping[str, str] = os.environ) -> bool:
    """Says whether all ranks run on this machine, by the variables of torchrun; without them there is one rank."""
    return "RANK" not in environment or environment.get("WORLD_SIZE") == environment.get("LOCAL_WORLD_SIZE", "1")


def stay_on_loopback(has_servers_elsewhere: bool = False, environment: MutableMapping[str, str] | None = None) -> None:
    """Keeps the sockets of gloo and NCCL on loopback where all ranks are on one node; what the user has set stays.

    `has_servers_elsewhere`: NCCL, which reads its setting once in a process, may have to reach servers of another node.
    """
    environment = os.environ if environment is None else environment
    if not is_on_one_node(environment):
        return
    environment.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK_INTERFACE)
    if not has_servers_elsewhere:
        environment.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK_INTERFACE)


def clear_traffic() -> list[str]:
    """Returns a line where the ranks' traffic leaves this machine: nothing encrypts it."""
    if is_on_one_node():
        return []
    return ["Warning: ranks on several nodes exchange gradients and texts unencrypted: use a network that you trust"]


def rendezvous(timeout: timedelta) -> dict[str, Any]:
    """Returns what init_process_group needs: the store that the ranks share, this rank and their number.

    Raises ValueError where the first rank cannot listen on MASTER_ADDR.
    """
    if "RANK" not in os.environ:
        return {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store: dist.Store
    if STORE_FILE in os.environ:
        store = dist.FileStore(os.environ[STORE_FILE], world_size)
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return {}  # torchrun has opened a store of its own
    else:
        host = LOOPBACK if is_on_one_node() else os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        if rank == 0:
            store = listening_store(address_to_listen_on(host), port, world_size, timeout)
        else:
            store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    store.set_timeout(timeout)
    return {"store": store, "rank": rank, "world_size": world_size}


def listening_store(address: str, port: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Opens a store that listens on one address alone; torch by itself would listen on all. Port 0 is any free one.

    Raises ValueError for an address that is not this node's, and for a port that is taken.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listening = socket.create_server((address, port), family=family, backlog=max(128, world_size))
    except OSError as error:
        raise ValueError(
            f"MASTER_ADDR, MASTER_PORT: the first rank cannot listen on {address}, port {port} ({error.strerror}); "
            "name an address of its node and a free port"
        ) from None
    return dist.TCPStore(
        address,
        listening.getsockname()[1],
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def address_to_listen_on(host: str) -> str:
    """Returns the address of this node that `host` names.

    A node may know its own name as a loopback address, as Debian's /etc/hosts has it, which the other nodes cannot
    reach: then it is the address on the interface that leads outside. A loopback address that is written as such, or
    as localhost, is meant: all ranks reach it.
    """
    address: str = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]  # type: ignore[assignment]
    is_meant = host in (address, "localhost")
    if is_on_one_node() or is_meant or not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 1))  # sends nothing; an address of the documentation, beyond every local network
        outside: str = probe.getsockname()[0]
    return outside
