"""Text from outside cannot steer a terminal, nor change what a log says."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from megatron_oreal.observability.printable import printable
from megatron_oreal.observability.progress import Announcer, ProgressBar


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, é 中 \U0001f600\n\tnext", "plain, é 中 \U0001f600\n\tnext"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("done\rError", r"done\x0dError"),
        ("a\x9bb\x00\x7f\x85", r"a\x9bb\x00\x7f\x85"),
        ("right\u202eleft\u2066", r"right\u202eleft\u2066"),
        ("half \ud800", r"half \ud800"),
        ("one\u2028two", r"one\u2028two"),
    ],
)
def test_control_characters_become_visible(text: str, expected: str) -> None:
    assert printable(text) == expected
    printable(text).encode()


def test_terminal_and_log_get_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, stream = tmp_path / "log.txt", io.StringIO()
    announcer = Announcer(True, log)
    announcer("server says \x1b[31mred\ud800")
    with ProgressBar(1, description="\x1b[1mbold", log_file=log, stream=stream) as progress:
        progress.note("\x1b[2J")
        progress.advance(1, answer="\x1b[3m")
    written = log.read_text() + stream.getvalue() + capsys.readouterr().err
    assert "\x1b" not in written
    assert r"\x1b[31mred\ud800" in written and r"\x1b[1mbold" in written and r"\x1b[3m" in written
