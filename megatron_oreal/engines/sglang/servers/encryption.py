"""Makes certificates for servers that other nodes reach, and warns the user about unencrypted traffic.

Each server gets its own certificate, which is not signed by an authority. Its clients know the certificate's
fingerprint from the endpoints file, which is private, and need neither host names nor authorities.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.listening import addresses_of

OPENSSL = (
    "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
    "-days", "3650", "-subj", "/CN=megatron-oreal", "-keyout", "-", "-out", "-",
)  # fmt: skip
BLOCK = re.compile(r"-----BEGIN ([A-Z ]+)-----\n(.+?)-----END \1-----\n", re.DOTALL)


@dataclass(slots=True, frozen=True)
class Certificate:
    """A certificate and its private key, both in PEM. The key goes to the server's supervisor through a pipe."""

    certificate: str
    private_key: str

    @property
    def fingerprint(self) -> str:
        match = BLOCK.search(self.certificate)
        assert match is not None
        return hashlib.sha256(base64.b64decode(match[2])).hexdigest()


def is_loopback(host: str) -> bool:
    addresses = addresses_of(host)
    return bool(addresses) and all(address.is_loopback for address in addresses)


def uses_tls(config: SglangConfig) -> bool:
    """Says whether servers use https. The default is yes if other nodes reach them and openssl is installed."""
    if config.tls == "auto":
        return not config.router and not is_loopback(config.host) and shutil.which(OPENSSL[0]) is not None
    return config.tls


def make_certificate() -> Certificate:
    """Makes a certificate. Raises ValueError if openssl cannot be run."""
    try:
        done = subprocess.run(OPENSSL, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            f"rollout.sglang.tls: openssl makes no certificate ({type(error).__name__}); install openssl, or set "
            "tls=false where you trust the network"
        ) from None
    blocks = {match[1]: match[0] for match in BLOCK.finditer(done.stdout)}
    return Certificate(blocks["CERTIFICATE"], blocks["PRIVATE KEY"])


def clear_traffic(endpoints: Sequence[Endpoint], config: SglangConfig) -> str | None:
    """Returns a line about unencrypted traffic between nodes; None if there is none."""
    elsewhere = [endpoint for endpoint in endpoints if not is_loopback(str(urlsplit(endpoint.url).hostname))]
    if not elsewhere:
        return None
    if any(endpoint.url.startswith("http:") for endpoint in elsewhere):
        what, fix = "keys, prompts and weights", "set rollout.sglang.tls=true where the servers are started, or "
    elif config.weight_transport == "distributed":
        what, fix = "weights", ""
    else:
        return None
    return f"Warning: {what} travel to {elsewhere[0]} unencrypted: {fix}use a network that you trust"
