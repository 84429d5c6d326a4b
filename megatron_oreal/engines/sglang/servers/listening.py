"""Finds the processes that listen on an address, from Linux's /proc, so that no other user's process gets a key.

A port may be free until a server listens on it, which takes a server minutes. Meanwhile, and after a server's death,
any user of the machine can listen there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from megatron_oreal.engines.sglang.servers.launcher import descendants

LISTEN = "0A"  # the code of the state LISTEN in /proc/net/tcp
ROOT = 0  # the user root can read every process's memory in any case
Address = IPv4Address | IPv6Address


@dataclass(slots=True, frozen=True)
class Listener:
    address: Address
    port: int
    user: int
    inode: int  # of the socket

    def takes(self, host: str) -> bool:
        """Says whether a connection to `host` and this port may reach this socket."""
        return self.address.is_unspecified or self.address in addresses_of(host)


def listeners(process: int | None = None) -> list[Listener] | None:
    """Returns all listening TCP sockets in the process's network; None if the system does not report them.

    Returns none for a process that has ended.
    """
    found = []
    folder = Path(f"/proc/{'self' if process is None else process}/net")
    try:
        for name in ("tcp", "tcp6"):
            if (folder / name).exists() or name == "tcp":  # a kernel without IPv6 has no tcp6
                found += [row for line in (folder / name).read_text().splitlines()[1:] if (row := read_row(line))]
    except OSError:
        return [] if Path("/proc/self/net/tcp").exists() else None
    return found


def read_row(line: str) -> Listener | None:
    """Parses a row, e.g. `0: 0100007F:7918 00000000:0000 0A ... 1000 0 35137 ...`: 127.0.0.1, port 31000, user 1000."""
    fields = line.split()
    if fields[3] != LISTEN:
        return None
    written, port = fields[1].split(":")
    # Words of four bytes have the machine's byte order, which is little-endian on all supported machines.
    words = [bytes.fromhex(written[begin : begin + 8])[::-1] for begin in range(0, len(written), 8)]
    address = ip_address(b"".join(words))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return Listener(mapped or address, int(port, 16), int(fields[7]), int(fields[9]))


def addresses_of(host: str) -> set[Address]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {ip_address(str(entry[4][0]).partition("%")[0]) for entry in found}


def sockets_of(processes: Iterable[int]) -> set[int]:
    """Returns the inodes of the processes' open sockets."""
    found: set[int] = set()
    for process in processes:
        try:
            descriptors = list(Path(f"/proc/{process}/fd").iterdir())
        except OSError:  # the process has ended meanwhile
            continue
        for descriptor in descriptors:
            try:
                target = str(descriptor.readlink())
            except OSError:
                continue
            if target.startswith("socket:["):
                found.add(int(target[8:-1]))
    return found


def tree_listens(process: int, host: str, port: int) -> bool | None:
    """Says whether only the process or its descendants listen there; None if the system does not report it."""
    found = listeners(process)
    if found is None:
        return None
    there = {listener.inode for listener in found if listener.port == port and listener.takes(host)}
    return bool(there) and there <= sockets_of([process, *descendants(process)])


def open_addresses(process: int) -> list[str]:
    """Returns the addresses where the process tree listens for other nodes, e.g. ["0.0.0.0:5557"]."""
    own = sockets_of([process, *descendants(process)])
    found = [listener for listener in listeners(process) or [] if listener.inode in own]
    return sorted(f"{each.address}:{each.port}" for each in found if not each.address.is_loopback)


def stranger_listens(host: str, port: int) -> bool:
    """Says whether another user of this machine listens there; False for another machine or an unknown answer."""
    if not any(address.is_loopback for address in addresses_of(host)):
        return False
    there = [listener for listener in listeners() or [] if listener.port == port and listener.takes(host)]
    return any(listener.user not in (os.getuid(), ROOT) for listener in there)
