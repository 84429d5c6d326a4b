"""The file that names servers and their keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_oreal.engines.sglang.endpoints import Endpoint, read_endpoints, write_endpoints

ENDPOINTS = [
    Endpoint("http://127.0.0.1:31000", "generate", "administer"),
    Endpoint("http://[::1]:31001", "generate too", "administer too", tensor=2),
]


def test_what_is_written_is_read_by_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "run" / "servers.json"
    for endpoints in (ENDPOINTS[:1], ENDPOINTS):  # the second time over an existing file
        write_endpoints(file, endpoints)
        assert read_endpoints(file) == endpoints
        assert file.stat().st_mode & 0o777 == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_keys_stay_out_of_messages() -> None:
    assert f"{ENDPOINTS[1]}" == "http://[::1]:31001"
    assert "administer" not in repr(ENDPOINTS) and "generate" not in repr(ENDPOINTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory); start megatron-oreal serve first"),
        ("[]", "names no server; start megatron-oreal serve again"),
        ("[{", "is not a list of servers; let megatron-oreal serve write it"),
        ("3", "is not a list of servers; let megatron-oreal serve write it"),
        ('["http://127.0.0.1:1"]', "is not a list of servers; let megatron-oreal serve write it"),
        ('[{"url": "http://127.0.0.1:1"}]', "is not a list of servers; let megatron-oreal serve write it"),
        ('{"url": "http://127.0.0.1:1"}', "is not a list of servers; let megatron-oreal serve write it"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "servers.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=r"rollout\.sglang\.endpoints_file: ") as caught:
        read_endpoints(file)
    assert str(caught.value) == f"rollout.sglang.endpoints_file: {file} {message}"
