"""What the steps of the GPU check find: one JSON object a line, written as soon as it is known."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[2]
Status = Literal["pass", "fail", "skipped", "info"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Example: Finding("loss", "forward, share of torch.mm", 0.81, "", "fail", ">= 0.92")."""

    step: str
    name: str
    value: float | str
    unit: str = ""
    status: Status = "info"
    wanted: str = ""  # what a pass needs

    def __str__(self) -> str:
        wanted = f" (wanted: {self.wanted})" if self.wanted else ""
        return f"[{self.status}] {self.name}: {shown(self.value)} {self.unit}".rstrip() + wanted


def shown(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class Recorder:
    """Appends the findings of one step to a file and prints them."""

    path: Path
    step: str

    def note(self, name: str, value: float | str, unit: str = "") -> None:
        self.write(Finding(self.step, name, value, unit))

    def skip(self, name: str, reason: str) -> None:
        self.write(Finding(self.step, name, reason, status="skipped"))

    def check(self, name: str, value: float | str, passed: bool, wanted: str = "", unit: str = "") -> None:
        self.write(Finding(self.step, name, value, unit, "pass" if passed else "fail", wanted))

    def attempt(self, name: str, make: Callable[[], object]) -> None:
        """Notes what `make` returns; what it raises is a failed check, and the step goes on."""
        try:
            found = make()
        except Exception as error:  # noqa: BLE001  # a report of what this machine lacks must not end at the first lack
            self.check(name, reason_of(error), passed=False)
            return
        self.note(name, found if isinstance(found, float | int | str) else str(found))

    def write(self, finding: Finding) -> None:
        print(finding, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(finding)) + "\n")


def reason_of(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def read_findings(path: Path) -> list[Finding]:
    """Without a line that its step was writing when it was ended."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(Finding(**json.loads(line)))
    return found


def timed(command: list[str]) -> float:
    """Runs one of the project's programs from the repository's root; returns its seconds. Raises where it fails."""
    start = time.perf_counter()
    print(">", " ".join(command), flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start


def prepare_quickstart(folder: Path, num_examples: int) -> None:
    """The quickstart's task, tokenizer and tiny model, unless `folder` holds them."""
    if not (folder / "model").is_dir():
        program = str(ROOT / "examples" / "quickstart" / "prepare.py")
        timed([sys.executable, program, "--out", str(folder), "--num-examples", str(num_examples)])
