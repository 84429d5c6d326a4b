"""Sends short requests to a starting server without the event loop, by HTTP or HTTPS with a known certificate.

A redirect counts as an answer like any other, and is not followed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import ssl
from typing import Any
from urllib.parse import urlsplit

from megatron_oreal.engines.sglang.endpoints import Endpoint

ANSWER_SECONDS = 30.0  # for a health check, in which the server generates a token
MAX_ANSWER_BYTES = 16 * 2**20


def answer(
    endpoint: Endpoint, path: str, key: str, method: str = "GET", body: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Returns an answer's status and JSON: status 0 without an answer, None if it is not JSON."""
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
    """Returns 200 if a server accepts its key, 401 or 403 if it refuses it, and 0 if nobody answers."""
    return answer(endpoint, "/model_info", endpoint.api_key)[0]


def connect(endpoint: Endpoint) -> http.client.HTTPConnection:
    """Opens a connection. Raises OSError without one, and for a server with another certificate."""
    url = urlsplit(endpoint.url)
    assert url.hostname is not None
    if url.scheme == "http":
        connection = http.client.HTTPConnection(url.hostname, url.port, timeout=ANSWER_SECONDS)
        connection.connect()
        return connection
    # The fingerprint identifies the certificate completely, so neither its name nor its authority is checked.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    secure = http.client.HTTPSConnection(url.hostname, url.port, timeout=ANSWER_SECONDS, context=context)
    secure.connect()
    certificate = secure.sock.getpeercert(binary_form=True) or b""
    if hashlib.sha256(certificate).hexdigest() != endpoint.certificate:
        secure.close()
        raise OSError(f"{endpoint} shows another certificate than the one in its file")
    return secure
