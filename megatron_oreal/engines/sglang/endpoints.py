"""Reads and writes the file with the addresses and keys of servers. Only its owner can read it.

A user who can write the file controls a run's keys, prompts and weights. The file is therefore trusted like a key of
ssh: it must belong to this user, and no other user may read or write it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SERVE = "let megatron-oreal serve write it"
KEY = re.compile(r"[ -~]*")  # any other character would end an HTTP header
CERTIFICATE = re.compile(r"[0-9a-f]{64}")
MAX_FILE_BYTES = 2**24


@dataclass(slots=True, frozen=True)
class Endpoint:
    url: str  # e.g. http://127.0.0.1:31000
    api_key: str = field(repr=False)  # gives access to generation
    admin_key: str = field(repr=False)  # gives access to weights and pauses
    tensor: int = 1  # the number of the server's GPUs, each of which receives weights
    certificate: str = ""  # with https: the SHA-256 of the certificate that the server must show, in hexadecimal

    def __str__(self) -> str:
        return self.url  # keys must not appear in logs


def write_endpoints(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Writes the file atomically with mode 0600. Raises ValueError if a file of another kind has its name."""
    check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump([asdict(endpoint) for endpoint in endpoints], file, indent=2)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Raises ValueError if the file would replace something that is not a list of servers."""
    if is_absent(path) or is_list_of_servers(path):
        return
    raise ValueError(
        f"rollout.sglang.endpoints_file: {path} is there already and names no servers; move it away, or name "
        "another file"
    )


def remove_endpoints(path: Path) -> None:
    """Removes the file if it still names `servers`."""
    if is_list_of_servers(path):
        path.unlink(missing_ok=True)
        path.with_name(f".{path.name}.lock").unlink(missing_ok=True)


def is_absent(path: Path) -> bool:
    return not path.exists() and not path.is_symlink()


def is_list_of_servers(path: Path) -> bool:
    with suppress(OSError, ValueError, TypeError, RecursionError):
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
            entries = json.loads(path.read_bytes())
            return isinstance(entries, list) and all(Endpoint(**entry) for entry in entries)
    return False


def read_endpoints(path: Path) -> list[Endpoint]:
    """Reads the file. Raises ValueError if it is missing, malformed, empty, or accessible to other users."""
    try:
        content = read_private(path)
    except OSError as error:
        raise ValueError(
            f"rollout.sglang.endpoints_file: {path} cannot be read ({error.strerror}); start megatron-oreal serve first"
        ) from None
    try:
        endpoints = [Endpoint(**entry) for entry in json.loads(content)]
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"rollout.sglang.endpoints_file: {path} is not a list of servers; {SERVE}") from None
    if not endpoints:
        raise ValueError(f"rollout.sglang.endpoints_file: {path} names no server; start megatron-oreal serve again")
    for number, endpoint in enumerate(endpoints):
        if (problem := why_unusable(endpoint)) is not None:
            raise ValueError(f"rollout.sglang.endpoints_file: server {number} of {path} {problem}; {SERVE}")
    return endpoints


@contextmanager
def in_use(path: Path, is_shared: bool) -> Iterator[None]:
    """Reserves the servers of the file for this run during the block. `is_shared`: it changes no weights.

    Raises ValueError while another run uses them that changes their weights, or, unless `is_shared`, while any run uses
    them. A killed run releases them. A file system without locks admits every run; the labels of the weights then tell
    runs apart.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"rollout.sglang.endpoints_file: another run uses the servers of {path}; wait until it has ended, or "
                "start servers of this run's own"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def read_private(path: Path) -> bytes:
    """Reads a file that only this user can read and write. Raises ValueError for any other file."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"rollout.sglang.endpoints_file: {path} is not a file; {SERVE}")
        if status.st_uid != os.geteuid():
            raise ValueError(
                f"rollout.sglang.endpoints_file: {path} belongs to another user (uid {status.st_uid}), who could take "
                "the run's keys and weights; run megatron-oreal serve as the same user as the trainer"
            )
        if status.st_mode & 0o077:
            raise ValueError(
                f"rollout.sglang.endpoints_file: {path} is open to other users (mode {status.st_mode & 0o777:04o}); "
                "chmod 600 it if nobody else has changed it"
            )
        return file.read(MAX_FILE_BYTES)


def why_unusable(endpoint: Endpoint) -> str | None:
    """Returns what is wrong with an endpoint of a file; None if it is usable."""
    if not all(isinstance(each, str) for each in (endpoint.url, endpoint.api_key, endpoint.admin_key)):
        return "has an address or a key that is no text"
    if not (KEY.fullmatch(endpoint.api_key) and KEY.fullmatch(endpoint.admin_key)):
        return "has a key with characters that no key has"
    if isinstance(endpoint.tensor, bool) or not isinstance(endpoint.tensor, int) or endpoint.tensor < 1:
        return f"has tensor={endpoint.tensor!r}, which is no number of GPUs"
    if not is_address(endpoint.url):
        return f"has the address {endpoint.url!r}, which is not http://HOST:PORT or https://HOST:PORT"
    certificate: Any = endpoint.certificate
    is_secure = endpoint.url.startswith("https")
    if not isinstance(certificate, str) or bool(certificate) != is_secure:
        return "has https without the certificate's fingerprint, or a fingerprint without https"
    if is_secure and not CERTIFICATE.fullmatch(certificate):
        return "has a fingerprint that is not a SHA-256 in hexadecimal"
    return None


def is_address(url: str) -> bool:
    if not re.fullmatch(r"https?://[!-~]+", url):
        return False
    try:
        parts = urlsplit(url)
        has_all = bool(parts.hostname) and parts.port is not None and parts.port > 0
    except ValueError:
        return False
    return has_all and not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
