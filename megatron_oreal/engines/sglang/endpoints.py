"""Reads and writes the file that names servers: their addresses and keys. Only its owner can read it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(slots=True, frozen=True)
class Endpoint:
    url: str  # e.g. http://127.0.0.1:31000
    api_key: str = field(repr=False)  # allows generation
    admin_key: str = field(repr=False)  # allows changes of weights, and pauses
    tensor: int = 1  # the server's GPUs, each of which receives weights

    def __str__(self) -> str:
        return self.url  # keys never reach a log


def write_endpoints(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Writes the file, which appears whole and with mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump([asdict(endpoint) for endpoint in endpoints], file, indent=2)
    os.replace(temporary, path)


def read_endpoints(path: Path) -> list[Endpoint]:
    """Reads the file. Raises ValueError when it is missing, malformed or empty."""
    try:
        endpoints = [Endpoint(**entry) for entry in json.loads(path.read_bytes())]
    except OSError as error:
        raise ValueError(
            f"rollout.sglang.endpoints_file: {path} cannot be read ({error.strerror}); start megatron-oreal serve first"
        ) from None
    except (ValueError, TypeError):
        raise ValueError(
            f"rollout.sglang.endpoints_file: {path} is not a list of servers; let megatron-oreal serve write it"
        ) from None
    if not endpoints:
        raise ValueError(f"rollout.sglang.endpoints_file: {path} names no server; start megatron-oreal serve again")
    return endpoints
