"""Checks the interfaces that gloo and NCCL use, and returns the expected speed of the job's links."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_oreal.doctor.findings import Finding, error, ok, warning
from megatron_oreal.parallel.rendezvous import is_on_one_node

NETWORK, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
PCIE_LANE = {3: 0.985, 4: 1.97, 5: 3.94, 6: 7.56}  # GB/s in each direction, by generation
SMI_SECONDS = 10.0
NVLINK = re.compile(r"Link \d+: ([\d.]+) GB/s")


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    interfaces: Mapping[str, int]  # name: Mbit/s, 0 if unknown
    infiniband: Mapping[str, tuple[str, float]] = field(default_factory=dict)  # device: state and Gbit/s of its port 1
    gloo: str = ""  # GLOO_SOCKET_IFNAME
    nccl: str = ""  # NCCL_SOCKET_IFNAME
    host: str = ""
    host_address: str = ""  # the address of the host's own name; empty if unknown
    master: str = ""  # MASTER_ADDR
    master_is_known: bool = True
    is_on_one_node: bool = True
    infiniband_is_off: bool = False  # NCCL_IB_DISABLE=1


def read_network(environment: Mapping[str, str] = os.environ) -> NetworkFacts:
    host, master = socket.gethostname(), environment.get("MASTER_ADDR", "")
    return NetworkFacts(
        interfaces={name: read_number(NETWORK / name / "speed") for _, name in socket.if_nameindex()},
        infiniband=read_infiniband(),
        gloo=environment.get("GLOO_SOCKET_IFNAME", ""),
        nccl=environment.get("NCCL_SOCKET_IFNAME", ""),
        host=host,
        host_address=resolve(host),
        master=master,
        master_is_known=not master or bool(resolve(master)),
        is_on_one_node=is_on_one_node(environment),
        infiniband_is_off=environment.get("NCCL_IB_DISABLE", "0") == "1",
    )


def read_number(file: Path) -> int:
    try:
        return max(0, int(file.read_text()))
    except (OSError, ValueError):  # an interface that is down has no speed, and a virtual one may have none
        return 0


def read_infiniband() -> dict[str, tuple[str, float]]:
    """Returns the state and rate of each device's first port, such as ("ACTIVE", 400.0)."""
    found = {}
    for port in sorted(INFINIBAND.glob("*/ports/1")):
        try:
            state = (port / "state").read_text().partition(":")[2].strip()
            rate = float((port / "rate").read_text().split()[0])
        except (OSError, ValueError, IndexError):
            continue
        found[port.parent.parent.name] = (state, rate)
    return found


def resolve(name: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return ""


def chosen_by_nccl(setting: str, interfaces: Sequence[str]) -> list[str]:
    """Applies NCCL_SOCKET_IFNAME: prefixes of names; after =, whole names; after ^, names to exclude."""
    kind, names = (setting[0], setting[1:]) if setting[:1] in ("^", "=") else ("", setting)
    if setting.startswith("^="):
        kind, names = "^=", setting[2:]
    wanted = [name.partition(":")[0] for name in names.split(",") if name]

    def fits(interface: str) -> bool:
        return any(interface == name if "=" in kind else interface.startswith(name) for name in wanted)

    return [each for each in interfaces if fits(each) != kind.startswith("^")]


def check_network(facts: NetworkFacts) -> Iterator[Finding]:
    name, known, is_fine = "interfaces", ", ".join(facts.interfaces), True
    missing = [each for each in facts.gloo.split(",") if each and each not in facts.interfaces]
    if missing:
        is_fine = False
        yield error(name, f"GLOO_SOCKET_IFNAME={missing[0]} is no interface", f"export one of: {known}; or unset it")
    if facts.nccl and not chosen_by_nccl(facts.nccl, list(facts.interfaces)):
        is_fine = False
        yield error(name, f"NCCL_SOCKET_IFNAME={facts.nccl} fits no interface", f"export one of: {known}; or unset it")
    if not facts.master_is_known:
        is_fine = False
        yield error(name, f"MASTER_ADDR={facts.master} cannot be resolved", "give the first node's name or address")
    if not facts.is_on_one_node:
        for setting, value in (("GLOO_SOCKET_IFNAME", facts.gloo), ("NCCL_SOCKET_IFNAME", facts.nccl)):
            if value in ("lo", "lo0"):
                is_fine = False
                yield error(name, f"{setting}={value} on several nodes", "it reaches this node alone: unset it")
        address = facts.host_address
        is_loopback = not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback
        if is_loopback and not facts.gloo:
            is_fine = False
            what = f"the name {facts.host} stands for {address or 'no address'}"
            yield warning(name, f"{what}: gloo may not reach other nodes", "export GLOO_SOCKET_IFNAME=INTERFACE")
        yield from check_infiniband(facts)
    if is_fine:
        where = (
            "all processes are on this host"
            if facts.is_on_one_node
            else f"this host's name stands for {facts.host_address}"
        )
        yield ok(name, f"{known}; {where}")


def check_infiniband(facts: NetworkFacts) -> Iterator[Finding]:
    active = {device for device, (state, _) in facts.infiniband.items() if state == "ACTIVE"}
    if facts.infiniband and facts.infiniband_is_off:
        yield warning("interfaces", "NCCL_IB_DISABLE=1 leaves InfiniBand unused", "unset it")
    down = sorted(facts.infiniband.keys() - active)
    if down:
        fix = "ask the site about the cables, or name the others in NCCL_IB_HCA"
        yield warning("interfaces", f"InfiniBand ports are down: {', '.join(down)}", fix)


@dataclass(frozen=True, slots=True)
class Link:
    """The slowest link that an all-reduce over all ranks uses."""

    name: str
    gigabytes_per_second: float | None  # in one direction, for all ranks of a host together; None: unknown


def expected_link(facts: NetworkFacts, on_gpus: bool) -> Link:
    """Returns the speed that the hardware reports."""
    if facts.is_on_one_node:
        return gpu_link() if on_gpus else Link("loopback", None)
    active = [rate for state, rate in facts.infiniband.values() if state == "ACTIVE"]
    if on_gpus and active and not facts.infiniband_is_off:
        return Link(f"{len(active)} x InfiniBand", sum(active) / 8)
    chosen = facts.nccl if on_gpus else facts.gloo
    names = chosen_by_nccl(chosen, list(facts.interfaces)) if chosen else list(facts.interfaces)
    fastest = max((facts.interfaces[each] for each in names if each in facts.interfaces), default=0)
    return Link("Ethernet", fastest / 8000 if fastest else None)


def gpu_link() -> Link:
    """Asks nvidia-smi for the NVLinks of the first GPU, or otherwise for its PCIe slot."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "nvlink", "--status", "--id=0"],
            capture_output=True, text=True, timeout=SMI_SECONDS, check=False,
        )  # fmt: skip
        links = [float(rate) for rate in NVLINK.findall(done.stdout)]
        if links:
            return Link(f"{len(links)} NVLinks", sum(links))
        query = ["nvidia-smi", "--query-gpu=pcie.link.gen.max,pcie.link.width.max", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
        generation, width = (int(number) for number in done.stdout.split(","))
        return Link(f"PCIe {generation} x{width}", PCIE_LANE.get(generation, 0.0) * width or None)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return Link("the GPUs' links", None)
