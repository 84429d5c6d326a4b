"""The tests that need CUDA, and their count."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import click
import torch

from tools.gpu.findings import ROOT, Recorder


def record_counts(recorder: Recorder, report: Path) -> None:
    """Counts of pytest's XML report; each failed test with the first line of its error."""
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    skipped = [case for case in cases if case.find("skipped") is not None]
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    passed = len(cases) - len(skipped) - len(failed)
    recorder.check(
        "tests", f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped", bool(passed) and not failed
    )
    for case in failed:
        recorder.check(f"{case.get('classname')}::{case.get('name')}", first_line(case), passed=False)
    for reason in sorted({str(case.find("skipped").get("message")) for case in skipped}):  # type: ignore[union-attr]
        number = sum(case.find("skipped").get("message") == reason for case in skipped)  # type: ignore[union-attr]
        recorder.skip(f"{number} tests", reason[:160])


def first_line(case: ElementTree.Element) -> str:
    """What a failed test says: its error's type and message, or what a fixture of it raised."""
    found = case.find("failure")
    found = case.find("error") if found is None else found
    assert found is not None
    lines = [line.strip() for line in (found.get("message") or found.text or "").splitlines() if line.strip()]
    return lines[0][:240] if lines else "failed"


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="tests")
@click.option("--report", type=click.Path(path_type=Path), required=True, help="Where pytest writes its XML report.")
@click.option("--only", default="", help="Passed to pytest as -k.")
@click.argument("paths", nargs=-1)
def main(findings: Path, step: str, report: Path, only: str, paths: tuple[str, ...]) -> None:
    """Runs tests/gpu, or PATHS."""
    recorder = Recorder(findings, step)
    if not torch.cuda.is_available():
        recorder.skip("tests", "torch finds no CUDA device")
        return
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "pytest",
        "--gpu",
        "-v",
        "-rs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--junitxml={report}", *(["-k", only] if only else []), *(paths or ["tests/gpu"])]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the step's time is over: pytest got the signal too, and writes what it knows
        status = process.wait(timeout=7)
    if report.is_file():
        record_counts(recorder, report)
    if status not in (0, 1):
        recorder.check("pytest", f"exit code {status}", passed=False)


if __name__ == "__main__":
    main()
