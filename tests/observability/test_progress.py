import io
from pathlib import Path

from megatron_oreal.observability.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_the_first_and_the_last_unit_have_a_line(tmp_path: Path) -> None:
    stream, log_file = io.StringIO(), tmp_path / "logs" / "progress.log"
    with ProgressBar(4, description="train", log_file=log_file, line_every_seconds=1e9, stream=stream) as bar:
        for step in range(4):
            bar.advance(loss=step / 3, phase="update")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert " train 1/4 step, " in lines[0] and lines[0].endswith("loss=0, phase=update")
    assert " train 4/4 step, " in lines[1] and lines[1].endswith("00:00 left, loss=1, phase=update")
    assert log_file.read_text() == stream.getvalue()


def test_every_due_unit_has_a_line() -> None:
    stream = io.StringIO()
    with ProgressBar(3, line_every_seconds=0.0, stream=stream) as bar:
        for _ in range(3):
            bar.advance()
    assert stream.getvalue().count("\n") == 3


def test_a_run_that_ends_early_writes_where_it_was() -> None:
    stream = io.StringIO()
    with ProgressBar(10, initial=5, line_every_seconds=1e9, stream=stream) as bar:
        bar.advance()
        bar.advance(2)
    assert "8/10 step" in stream.getvalue().splitlines()[-1]


def test_a_resumed_run_continues_its_log_file(tmp_path: Path) -> None:
    log_file = tmp_path / "progress.log"
    for initial in (0, 1):
        with ProgressBar(2, initial=initial, log_file=log_file, stream=io.StringIO()) as bar:
            bar.advance()
    assert [line.split()[2] for line in log_file.read_text().splitlines()] == ["1/2", "2/2"]


def test_a_terminal_shows_a_bar_and_notes_stay_above_it(tmp_path: Path) -> None:
    stream, log_file = Terminal(), tmp_path / "progress.log"
    with ProgressBar(2, description="eval", log_file=log_file, stream=stream) as bar:
        bar.note("a checkpoint")
        bar.advance(2, loss=0.5)
    shown = stream.getvalue()
    assert "a checkpoint\n" in shown and "eval: 100%" in shown and "loss=0.5" in shown
    assert log_file.read_text().splitlines()[0].endswith(" a checkpoint")


def test_the_silent_bar_writes_nothing() -> None:
    with ProgressBar.silent() as bar:
        bar.advance(3, loss=1.0)
        bar.note("nothing")
