"""The file that names servers and their keys."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.engines.sglang.endpoints import Endpoint, in_use, read_endpoints, remove_endpoints, write_endpoints

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
        file.chmod(0o600)
    with pytest.raises(ValueError, match=r"rollout\.sglang\.endpoints_file: ") as caught:
        read_endpoints(file)
    assert str(caught.value) == f"rollout.sglang.endpoints_file: {file} {message}"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o666, 0o604])
def test_a_file_that_is_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "servers.json"
    write_endpoints(file, ENDPOINTS)
    file.chmod(mode)
    with pytest.raises(ValueError, match=rf"is open to other users \(mode {mode:04o}\); chmod 600"):
        read_endpoints(file)


@pytest.mark.skipif(os.getuid() != 0, reason="needs to give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    write_endpoints(file, ENDPOINTS)
    os.chown(file, 65534, 65534)
    with pytest.raises(ValueError, match=r"belongs to another user \(uid 65534\)"):
        read_endpoints(file)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"url": "file:///etc/passwd"}, "which is not http://HOST:PORT"),
        ({"url": "ftp://127.0.0.1:1"}, "which is not http://HOST:PORT"),
        ({"url": "http://127.0.0.1"}, "which is not http://HOST:PORT"),
        ({"url": "http://user@127.0.0.1:1"}, "which is not http://HOST:PORT"),
        ({"url": "http://127.0.0.1:1/path"}, "which is not http://HOST:PORT"),
        ({"url": "http://127.0.0.1:99999"}, "which is not http://HOST:PORT"),
        ({"url": "http://127.0.0.1:1\r\nHost: x"}, "which is not http://HOST:PORT"),
        ({"url": 3}, "an address or a key that is no text"),
        ({"api_key": None}, "an address or a key that is no text"),
        ({"admin_key": "a\r\nX: y"}, "a key with characters that no key has"),
        ({"tensor": 0}, "tensor=0, which is no number of GPUs"),
        ({"tensor": True}, "tensor=True, which is no number of GPUs"),
        ({"url": "https://127.0.0.1:1"}, "https without the certificate's fingerprint"),
        ({"certificate": "0" * 64}, "a fingerprint without https"),
        ({"url": "https://127.0.0.1:1", "certificate": "x"}, "not a SHA-256 in hexadecimal"),
    ],
)
def test_a_server_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    file = tmp_path / "servers.json"
    entry = {"url": "http://127.0.0.1:31000", "api_key": "a", "admin_key": "b", "tensor": 1}
    file.write_text(json.dumps([entry, entry | changes]))
    file.chmod(0o600)
    with pytest.raises(ValueError, match=r"^rollout\.sglang\.endpoints_file: server 1 of ") as caught:
        read_endpoints(file)
    assert problem in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["mine", "{}", '[{"name": "mine"}]', "[3]", '["a"]', "[" * 100_000, ""])
def test_a_users_own_file_is_neither_replaced_nor_removed(tmp_path: Path, content: str) -> None:
    file = tmp_path / "notes.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"notes\.json is there already and names no servers; move it away"):
        write_endpoints(file, ENDPOINTS)
    remove_endpoints(file)
    assert file.read_text() == content
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="names no servers"):
        write_endpoints(folder, ENDPOINTS)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    with pytest.raises(ValueError, match="names no servers"):
        write_endpoints(link, ENDPOINTS)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(ValueError, match="is not a file"):
        read_endpoints(tmp_path / "pipe")
    with pytest.raises(ValueError, match="names no servers"):
        write_endpoints(tmp_path / "pipe", ENDPOINTS)


def test_a_second_run_is_told_that_servers_are_in_use(tmp_path: Path) -> None:
    file = tmp_path / "servers.json"
    write_endpoints(file, [Endpoint("http://127.0.0.1:1", "a", "b")])
    with in_use(file, is_shared=True), in_use(file, is_shared=True):
        with pytest.raises(ValueError, match="another run uses the servers of"), in_use(file, is_shared=False):
            pass
    for is_shared in (True, False):
        with in_use(file, is_shared=False):
            with pytest.raises(ValueError, match="another run uses the servers of"), in_use(file, is_shared):
                pass
    remove_endpoints(file)
    assert not [*tmp_path.iterdir()]
