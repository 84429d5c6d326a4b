"""Checks SGLang: its environment, the servers that a file names, and the ports and GPUs of servers to start."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_oreal.config import SglangConfig
from megatron_oreal.doctor.findings import Finding, error, of_mistake, ok, warning
from megatron_oreal.doctor.versions import is_met, read_requirements
from megatron_oreal.engines.sglang.endpoints import read_endpoints
from megatron_oreal.engines.sglang.servers.answers import key_status
from megatron_oreal.engines.sglang.servers.fleet import visible_gpus
from megatron_oreal.engines.sglang.servers.node import assign_gpus, check_gpus_are_free, is_free

PYTHON_SECONDS = 15.0
MAX_SERVERS = 64  # checked concurrently
ASK_VERSIONS = """
import importlib.metadata, json
found = {}
for name in ("sglang", "torch", "transformers"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
MAKE = "make it with tools/setup_sglang.sh, or name another interpreter in rollout.sglang.python"


@dataclass(frozen=True, slots=True)
class Environment:
    """SGLang's own Python environment."""

    python: Path
    versions: dict[str, str]
    problem: str = ""  # why the interpreter does not run


def read_environment(python: Path) -> Environment:
    """Lists the packages of the interpreter without importing them, because imports take seconds."""
    try:
        done = subprocess.run(
            [str(python), "-c", ASK_VERSIONS], capture_output=True, text=True, timeout=PYTHON_SECONDS, check=True
        )
        return Environment(python, json.loads(done.stdout))
    except subprocess.CalledProcessError as raised:
        return Environment(python, {}, (raised.stderr or "it ends with an error").strip().splitlines()[-1][:200])
    except subprocess.TimeoutExpired:
        return Environment(python, {}, f"no answer within {PYTHON_SECONDS:.0f} s")
    except (OSError, ValueError) as raised:
        return Environment(python, {}, getattr(raised, "strerror", None) or str(raised))


def check_environment(found: Environment, is_needed: bool, has_gpus: bool) -> Iterator[Finding]:
    """Checks the environment. `is_needed`: whether the configuration starts servers; otherwise it is optional."""
    name, kind = "sglang", error if is_needed else warning
    if found.problem or "sglang" not in found.versions:
        what = found.problem or "it has no sglang"
        note = "" if is_needed else " (only rollout.engine=sglang needs it)"
        yield kind(name, f"{found.python} cannot serve: {what}{note}", MAKE)
        return
    version, build = found.versions["sglang"], found.versions.get("torch", "no torch")
    needed = next(one for one in read_requirements("sglang") if one.name == "sglang")
    if not is_met(needed, version):
        yield kind(name, f"sglang {version} in {found.python} is not {needed.specifier}", "install one of these there")
    elif has_gpus and build.endswith("+cpu"):
        yield kind(name, f"{found.python} has torch {build}, and this host has GPUs", "install SGLang for CUDA there")
    else:
        yield ok(name, f"sglang {version} with torch {build} in {found.python}")


def check_endpoints(file: Path) -> Iterator[Finding]:
    """Checks whether each server that the file names answers and accepts its key."""
    name = "endpoints"
    try:
        endpoints = read_endpoints(file)
    except ValueError as mistake:
        yield of_mistake(name, mistake)
        return
    with ThreadPoolExecutor(min(len(endpoints), MAX_SERVERS)) as pool:
        statuses = list(pool.map(key_status, endpoints))
    again = f"start megatron-oreal serve again, which writes {file}"
    for endpoint, status in zip(endpoints, statuses, strict=True):
        if status == 0:
            yield error(name, f"{endpoint} does not answer", f"{again}; or open its port between the nodes")
        elif status in (401, 403):
            yield error(name, f"{endpoint} refuses its key, so another server has its port", again)
        elif status != 200:
            yield error(name, f"{endpoint} answers with status {status}", "its log says why")
    if all(status == 200 for status in statuses):
        yield ok(name, f"{len(endpoints)} servers of {file} answer")


def check_ports(config: SglangConfig) -> Iterator[Finding]:
    """Checks whether enough ports are free for the servers and the router."""
    first, last = config.ports
    needed, free = config.num_servers + config.router, 0
    try:
        for port in range(first, last + 1):
            free += is_free(config.host, port)
            if free == needed:
                yield ok("ports", f"{needed} of {first} to {last} are free on {config.host}")
                return
    except ValueError as mistake:
        yield of_mistake("ports", mistake)
        return
    yield error(
        "ports",
        f"{free} of the ports {first} to {last} are free on {config.host}, {needed} are needed",
        "name another range in rollout.sglang.ports, or end the servers that are there",
    )


def check_server_gpus(
    config: SglangConfig, num_local_ranks: int, visible: Sequence[str] | None = None
) -> Iterator[Finding]:
    """Compares the servers' GPUs with this host's; does nothing on a CPU."""
    if visible is None:
        visible = visible_gpus() if torch.cuda.is_available() else []
    if not visible:
        return
    try:
        groups = assign_gpus(config, num_local_ranks, visible)
        if config.placement == "disaggregated":
            check_gpus_are_free([gpu for group in groups for gpu in group])
    except ValueError as mistake:
        yield of_mistake("layout", mistake)
        return
    gpus = "; ".join(",".join(group) for group in groups)
    yield ok("layout", f"{config.placement} servers on GPUs {gpus}, {num_local_ranks} processes of the trainer")
