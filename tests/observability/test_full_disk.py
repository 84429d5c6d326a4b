"""A full disk is one line with a way out, whichever library met it."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from megatron_oreal.launch import one_line_errors
from megatron_oreal.observability.full_disk import WAY_OUT, describe_os_error, is_full_disk

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 742080 vs 741968"),
]


@pytest.mark.parametrize("error", FULL, ids=str)
def test_a_full_disk_is_recognised(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_full_disk(error)
    with pytest.raises(SystemExit, match="1"), one_line_errors():
        raise error
    assert capsys.readouterr().err == f"Error: {WAY_OUT}\n"


def test_the_file_is_named_where_it_is_known() -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "/data/run/log.txt")
    assert describe_os_error(error) == f"/data/run/log.txt: {WAY_OUT}"


def test_other_errors_stay_as_they_are() -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "/data")
    assert not is_full_disk(error) and describe_os_error(error) == str(error)
    with pytest.raises(RuntimeError, match="size mismatch"), one_line_errors():
        raise RuntimeError("size mismatch")
