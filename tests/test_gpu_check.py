"""The GPU check: steps that pass, fail, hang and are left out; counts of operations; the tiny check on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tools.gpu import check, gpu_tests
from tools.gpu.check import Check, Folders, Step
from tools.gpu.findings import Finding, Recorder, read_findings
from tools.gpu.random_model import ModelShape
from tools.gpu.report import StepResult, as_markdown, step_status

# Stands in for a program of tools/gpu: what a step makes of its end, its hang and its findings is the check's own code.
PROGRAM = """
import os, sys, time
from pathlib import Path
from tools.gpu.findings import Recorder
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
recorder = Recorder(Path(options["--findings"]), options["--step"])
what = options["--do"]
recorder.note("begun", 1.0)
if what == "hang":
    time.sleep(60)
if what == "path":
    recorder.note("path", os.environ["LD_LIBRARY_PATH"])
if what == "die":
    sys.exit(7)
if what == "miss":
    recorder.check("share", 0.5, passed=False, wanted=">= 0.9")
"""


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folders:
    found = Folders(tmp_path / "out", tmp_path / "work", tmp_path / "wheels")
    for folder in (found.out, found.work):
        folder.mkdir()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def command(self: Folders, arguments: tuple[str, ...], step: str) -> list[str]:
        return [sys.executable, str(program), "--findings", str(self.findings), "--step", step, "--do", *arguments]

    monkeypatch.setattr(Folders, "command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return found


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(folders: Folders) -> None:
    steps = [Step("dies", 50, (("die",),)), Step("hangs", 7, (("hang",),)), Step("misses", 50, (("miss",),))]
    steps += [Step("te_needs", 50, (("pass",),), with_te=True), Step("works", 50, (("pass",),))]
    run = Check(folders, seconds=200)
    run.run(steps)
    found = {result.name: (result.status, result.note) for result in run.results}
    assert found == {
        "dies": ("fail", "exit code 7"),
        "hangs": ("fail", "ended after 7 s"),
        "misses": ("fail", "1 failed"),
        "te_needs": ("skipped", "Transformer Engine is not installed"),
        "works": ("pass", ""),
    }
    report = json.loads((folders.out / "report.json").read_text())
    assert [step["name"] for step in report["steps"]] == list(found)
    assert {"step": "misses", "name": "share", "value": 0.5, "unit": "", "status": "fail", "wanted": ">= 0.9"} in (
        report["findings"]
    )


def test_steps_without_time_are_left_out_and_what_they_start_is_ended(folders: Folders) -> None:
    run = Check(folders, seconds=14)
    begin = time.monotonic()
    run.run([Step("hangs", 99, (("hang",),)), Step("late", 99, (("pass",),))])
    assert time.monotonic() - begin < 30
    assert [(each.name, each.status) for each in run.results] == [("hangs", "fail"), ("late", "skipped")]
    assert run.results[1].note == "no time left"


def test_a_step_in_the_background_ends_before_the_steps_that_need_it(folders: Folders) -> None:
    install = Step("te_install", 50, (("pass",),), in_background=True)
    steps = [install, Step("first", 50, (("pass",),)), Step("te_test", 50, (("pass",),), with_te=True)]
    run = Check(folders, seconds=200)
    run.run(steps)
    assert [(each.name, each.status) for each in run.results] == [
        ("first", "pass"),
        ("te_install", "pass"),
        ("te_test", "pass"),
    ]


def test_only_the_step_of_lib_sees_it(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine fails where it finds a second CUDA runtime."""
    library = folders.wheels / "lib"
    library.mkdir(parents=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/usr/local/lib")
    steps = [Step("with", 50, (("path",),), with_libraries=True), Step("without", 50, (("path",),))]
    Check(folders, seconds=200).run(steps)
    paths = {each.step: each.value for each in read_findings(folders.findings) if each.name == "path"}
    assert paths == {"with": f"{library}:/usr/local/lib", "without": "/usr/local/lib"}
    assert [step.name for step in check.STEPS if step.with_libraries] == ["loss_hopper"]
    assert "LD_LIBRARY_PATH" not in (ROOT / "tools" / "gpu_check.sh").read_text()


def test_the_steps_of_transformer_engine_bring_its_installation(tmp_path: Path) -> None:
    folders = Folders(tmp_path, tmp_path, tmp_path)
    chosen = check.chosen_steps(["te_fp8", "facts"], False, folders)
    assert [step.name for step in chosen] == ["te_install", "facts", "te_fp8"]
    default = [step.name for step in check.chosen_steps([], False, folders)]
    assert "quickstart" in default
    assert not [name for name in default if name.startswith("te_")]
    (tmp_path / "te").mkdir()
    assert [step.name for step in check.chosen_steps([], False, folders)] == [step.name for step in check.STEPS]


def test_the_report_shows_every_finding(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "findings.jsonl", "loss")
    recorder.note("torch | compiled", 12345.6, "ms")
    recorder.check("share", 0.815, passed=False, wanted=">= 0.92")
    recorder.skip("rival", "not installed")
    with recorder.path.open("a") as file:
        file.write('{"step": "loss", "name": "torn')
    findings = read_findings(recorder.path)
    text = as_markdown([StepResult("loss", "fail", 12.4, "1 failed")], findings, "GPU check")
    assert "| loss | **FAIL** | 12 | 1 failed |" in text
    assert "| torch \\| compiled | 12,346 ms |  |  |" in text
    assert "| share | 0.815 | **FAIL** | >= 0.92 |" in text
    assert "| rival | not installed | skipped |  |" in text


@pytest.mark.parametrize(
    ("exit_code", "statuses", "expected"),
    [
        (0, ["info", "pass"], "pass"),
        (0, ["pass", "fail"], "fail"),
        (3, ["info"], "fail"),
        (0, ["skipped", "info"], "pass"),
        (0, ["skipped"], "skipped"),
        (0, [], "skipped"),
    ],
)
def test_the_status_of_a_step(exit_code: int, statuses: list[str], expected: str) -> None:
    findings = [Finding("step", "name", 1.0, status=status) for status in statuses]  # type: ignore[arg-type]
    assert step_status(exit_code, findings) == expected


def test_counts_of_a_report_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad():\n    raise ValueError('two libraries\\nfound')\n"
        "@pytest.fixture\n"
        "def broken(): raise KeyError('gone')\n"
        "def test_unready(broken): pass\n"
        "@pytest.mark.skip(reason='needs 2 GPUs')\n"
        "def test_left_out(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml=report.xml", "."]
    subprocess.run(command, cwd=tmp_path, check=False, capture_output=True)
    recorder = Recorder(tmp_path / "findings.jsonl", "tests")
    gpu_tests.record_counts(recorder, tmp_path / "report.xml")
    assert [(each.name, each.value, each.status) for each in read_findings(recorder.path)] == [
        ("tests", "1 passed, 2 failed, 1 skipped", "fail"),
        ("test_sample::test_bad", "ValueError: two libraries", "fail"),
        ("test_sample::test_unready", "failed on setup with \"KeyError: 'gone'\"", "fail"),
        ("1 tests", "needs 2 GPUs", "skipped"),
    ]


def test_the_operations_of_a_forward_pass() -> None:
    shape = ModelShape(hidden=8, intermediate=16, layers=2, heads=4, key_heads=2, vocabulary=32)
    # A layer: q 8x8, k and v 8x4 each, o 8x8, three of 8x16.
    assert shape.layer_parameters == 2 * (64 + 2 * 32 + 64 + 3 * 128)
    # Sequences of 3 and 5 tokens, 4 of which meet the vocabulary; attention: 2 x length^2 x hidden a layer.
    layers, attention, head = 2 * shape.layer_parameters * 8, 2 * (9 + 25) * 8 * 2, 2 * 32 * 8 * 4
    assert shape.forward_flops([3, 5], 4) == layers + attention + head


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tiny_check_passes_on_this_machine(tmp_path: Path) -> None:
    command = ["bash", "tools/gpu_check.sh", "--tiny", "--minutes", "14", "--out", str(tmp_path / "out")]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=890, check=False)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    statuses = {step["name"]: step["status"] for step in report["steps"]}
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
    assert statuses.pop("tests") in ("skipped", "pass")
    assert set(statuses.values()) == {"pass"}, run.stdout[-6000:]


def test_a_step_that_does_not_exist_is_named() -> None:
    command = ["bash", "tools/gpu_check.sh", "nonsense"]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert run.returncode == 2
    assert "no step nonsense: choose from" in run.stderr


def environment() -> dict[str, str]:
    return os.environ | {"PYTHON": sys.executable}
