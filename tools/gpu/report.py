"""The report of a GPU check, written again after every step: Markdown for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tools.gpu.findings import Finding, shown

MARKS = {"pass": "pass", "fail": "**FAIL**", "skipped": "skipped", "info": ""}


@dataclass(frozen=True, slots=True)
class StepResult:
    name: str
    status: str  # pass, fail, skipped
    seconds: float
    note: str  # why it failed or was left out


def step_status(exit_code: int, findings: Sequence[Finding]) -> str:
    """A step fails with its program or with one of its checks; without any result it was left out."""
    if exit_code or any(each.status == "fail" for each in findings):
        return "fail"
    return "skipped" if all(each.status == "skipped" for each in findings) else "pass"


def as_markdown(steps: Sequence[StepResult], findings: Sequence[Finding], heading: str) -> str:
    lines = [f"# {heading}", "", "| step | result | seconds | note |", "| --- | --- | --- | --- |"]
    lines += [f"| {s.name} | {MARKS[s.status]} | {s.seconds:.0f} | {cell(s.note)} |" for s in steps]
    for step in dict.fromkeys(each.step for each in findings):
        lines += ["", f"## {step}", "", "| what | value | result | wanted |", "| --- | --- | --- | --- |"]
        for each in findings:
            if each.step == step:
                value = f"{shown(each.value)} {each.unit}".strip()
                lines.append(f"| {cell(each.name)} | {cell(value)} | {MARKS[each.status]} | {cell(each.wanted)} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def write_report(folder: Path, steps: Sequence[StepResult], findings: Sequence[Finding], heading: str) -> None:
    (folder / "report.md").write_text(as_markdown(steps, findings, heading))
    result = {"heading": heading, "steps": [asdict(s) for s in steps], "findings": [asdict(f) for f in findings]}
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
