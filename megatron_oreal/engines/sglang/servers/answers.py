"""Asks a server without the event loop, while it starts: short questions, by HTTP or by HTTPS with a known certificate.

A redirect is an answer like any other here: nothing is sent to where it leads.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from megatron_oreal.engines.sglang.endpoints import Endpoint

ANSWER_SECONDS = 30.0  # that a health check may take: the server generates a token for it
MAX_ANSWER_BYTES = 16 * 2**20


def answer(
    endpoint: Endpoint, path: str, key: str, method: str = "GET", body: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Returns an answer's status and JSON: status 0 when there is no answer, None when it is not JSON."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    content = None if body is None else json.dumps(body).encode()
    try:
        connection = connect(endpoint)
    except OSError:
        return 0, None
    try:
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        text = response.read(MAX_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()
    try:
        return response.status, json.loads(text or b"null") if len(text) <= MAX_ANSWER_BYTES else None
    except (ValueError, RecursionError):
        return response.status, None


def key_status(endpoint: Endpoint) -> int:
    """Returns 200 where a server takes its key, 401 or 403 where it refuses it, and 0 where nobody answers."""
    return answer(endpoint, "/model_info", endpoint.api_key)[0]


def connect(endpoint: Endpoint) -> http.client.HTTPConnection:
    """Opens a connection. Raises OSError without one, and for a server that shows another certificate."""
    url = urlsplit(endpoint.url)
    assert url.hostname is not None
    if url.scheme == "http":
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=ANSWER_SECONDS)
        connection.connect()
        return connection
    # The fingerprint says more than a name or an authority would, so nothing else of the certificate is checked.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    secure = http.client.HTTPSConnection(url.hostname, url.port, timeout=ANSWER_SECONDS, context=context)
    secure.connect()
    certificate = secure.sock.getpeercert(binary_form=True) or b""
    if hashlib.sha256(certificate).hexdigest() != endpoint.certificate:
        secure.close()
        raise OSError(f"{endpoint} shows another certificate than the one in its file")
    return secure
