"""Runs the steps of the GPU check, each within its time, and reports what is known after every one.

A step is one program or several; what it finds goes to a file line by line (tools/gpu/findings.py). A step that fails,
hangs or dies does not keep the next one from running.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import click
import torch

from tools.gpu.findings import ROOT, read_findings
from tools.gpu.report import StepResult, step_status, write_report

HOPPER = "Liger, Hopper"  # of bench_fused_loss.py
MIN_SECONDS = 12  # with less left, a step is not begun
KILL_AFTER_SECONDS = 8  # between SIGINT and SIGKILL


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    seconds: int  # at most
    commands: tuple[tuple[str, ...], ...]  # module of tools.gpu and its arguments; {work}, {out}, {te} are folders
    with_te: bool = False  # sees the Transformer Engine that te_install made
    with_libraries: bool = False  # finds the kit's lib/: with a second CUDA runtime there, Transformer Engine fails
    in_background: bool = False  # starts first, beside the others, at low priority


STEPS = (
    Step("te_install", 330, (("te_install", "--source", "{wheels}/te", "--site", "{te}"),), in_background=True),
    Step("facts", 60, (("facts",),)),
    Step("ceilings", 40, (("ceilings",),)),
    Step("tests", 170, (("gpu_tests", "--report", "{work}/tests_gpu.xml"),)),
    Step("loss", 110, (("loss", "--out", "{out}/loss.json"),)),
    Step(
        "loss_hopper",
        40,
        (("loss", "--out", "{work}/hopper.json", "--seconds", "20", "--method", "torch.mm", "--method", HOPPER),),
        with_libraries=True,
    ),
    Step("quickstart", 240, (("quickstart", "--work", "{work}", "--out", "{out}/quickstart_metrics.jsonl"),)),
    Step("update_0.5b", 60, (("update", "--size", "0.5b", "--work", "{work}"),)),
    Step("update_1.5b", 90, (("update", "--size", "1.5b", "--work", "{work}"),)),
    Step("profile", 70, (("profile_update", "--size", "0.5b", "--work", "{work}", "--out", "{out}/profile.txt"),)),
    Step("generate", 60, (("generate", "--size", "0.5b", "--work", "{work}"),)),
    Step(
        "fp8",
        90,
        (
            ("update", "--size", "0.5b", "--work", "{work}", "model.head_precision=bf16"),
            ("update", "--size", "0.5b", "--work", "{work}", "model.head_precision=fp8_grad"),
            ("ratio", "model.head_precision=fp8_grad", "model.head_precision=bf16"),
        ),
    ),
    Step(
        "te_tests",
        90,
        (
            ("gpu_tests", "--report", "{work}/tests_te.xml", "tests/gpu/test_transformer_engine.py"),
            (
                "gpu_tests",
                "--report",
                "{work}/tests_te_fp8.xml",
                "--only",
                "transformer_engine",
                "tests/gpu/test_fp8.py",
            ),
        ),
        with_te=True,
    ),
    Step("te_update_0.5b", 60, (("update", "--size", "0.5b", "--work", "{work}"),), with_te=True),
    Step("te_update_1.5b", 90, (("update", "--size", "1.5b", "--work", "{work}"),), with_te=True),
    Step("te_fp8", 90, (("update", "--size", "0.5b", "--work", "{work}", "model.fp8=tensorwise"),), with_te=True),
)
# On a CPU: the same programs with sizes that say nothing about speed, to see that they run.
TINY_STEPS = (
    Step("facts", 300, (("facts",),)),
    Step("ceilings", 180, (("ceilings", "--tiny"),)),
    Step("tests", 180, (("gpu_tests", "--report", "{work}/tests_gpu.xml"),)),
    Step("loss", 300, (("loss", "--tiny", "--out", "{out}/loss.json"),)),
    Step("quickstart", 900, (("quickstart", "--tiny", "--work", "{work}", "--out", "{out}/quickstart_metrics.jsonl"),)),
    Step("update_tiny", 300, (("update", "--size", "tiny", "--prompts", "4", "--work", "{work}", "--steps", "2"),)),
    Step(
        "profile",
        300,
        (("profile_update", "--size", "tiny", "--prompts", "2", "--work", "{work}", "--out", "{out}/profile.txt"),),
    ),
    Step("generate", 300, (("generate", "--size", "tiny", "--rows", "8", "--new-tokens", "8", "--work", "{work}"),)),
)


@dataclass(frozen=True, slots=True)
class Folders:
    out: Path
    work: Path
    wheels: Path

    @property
    def findings(self) -> Path:
        return self.work / f"findings-{os.getpid()}.jsonl"

    @property
    def te(self) -> Path:
        return self.work / "te"

    def command(self, program: Sequence[str], step: str) -> list[str]:
        names = {"work": self.work, "out": self.out, "wheels": self.wheels, "te": self.te}
        module, *arguments = (argument.format(**names) for argument in program)
        started = [sys.executable, "-W", "ignore", "-m", f"tools.gpu.{module}"]
        return [*started, "--findings", str(self.findings), "--step", step, *arguments]


class RunningStep:
    """A step's programs, one after the other, in a thread, so that one step may run beside others."""

    def __init__(self, step: Step, folders: Folders, seconds: float) -> None:
        self.step, self.folders, self.seconds = step, folders, seconds
        self.begin = time.monotonic()
        self.exit_code, self.note, self.took = 0, "", 0.0
        self.process: subprocess.Popen[str] | None = None
        self.thread = threading.Thread(target=self.run, name=step.name)
        self.thread.start()

    def run(self) -> None:
        for program in self.step.commands:
            left = self.seconds - (time.monotonic() - self.begin)
            if left < MIN_SECONDS / 2:
                self.exit_code, self.note = 124, "no time for its last programs"
                break
            code = self.run_program(self.folders.command(program, self.step.name), left)
            self.exit_code = self.exit_code or code
        self.took = time.monotonic() - self.begin

    def run_program(self, command: list[str], seconds: float) -> int:
        """Its output goes to the log and, line by line, to ours."""
        environment = dict(os.environ)
        if self.step.with_te:
            put_first(environment, "PYTHONPATH", self.folders.te)
        if self.step.with_libraries and (self.folders.wheels / "lib").is_dir():
            put_first(environment, "LD_LIBRARY_PATH", self.folders.wheels / "lib")
        prefix = ["nice", "-n", "10"] if self.step.in_background else []
        self.process = process = subprocess.Popen(
            [*prefix, *command],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        reader = threading.Thread(target=self.copy_output, args=(process,), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.note = f"ended after {seconds:.0f} s"
            code = 124
        end_session(process)
        reader.join(5)
        if code not in (0, 124):
            self.note = f"exit code {code}"
        return code

    def copy_output(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with (self.folders.out / "log.txt").open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if not self.step.in_background:
                    print(line, end="", flush=True)

    def stop(self) -> None:
        self.seconds = 0.0
        if self.process is not None:
            end_session(self.process)

    def result(self) -> StepResult:
        """Waits for its end."""
        self.thread.join()
        found = [each for each in read_findings(self.folders.findings) if each.step == self.step.name]
        failed = sum(each.status == "fail" for each in found)
        note = "; ".join(filter(None, [self.note, f"{failed} failed" if failed else ""]))
        return StepResult(self.step.name, step_status(self.exit_code, found), self.took, note)


def put_first(environment: dict[str, str], name: str, folder: Path) -> None:
    environment[name] = ":".join(filter(None, [str(folder), environment.get(name, "")]))


def end_session(process: subprocess.Popen[str]) -> None:
    """Ends the process and all that it started: politely, then not."""
    for number, patience in ((signal.SIGINT, KILL_AFTER_SECONDS), (signal.SIGKILL, 5)):
        if process.poll() is not None and number is signal.SIGINT:
            continue  # what it left behind gets no more time
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def chosen_steps(names: Sequence[str], tiny: bool, folders: Folders) -> list[Step]:
    """Returns the steps in the table's order. Raises UsageError for a name that it does not have."""
    steps = TINY_STEPS if tiny else STEPS
    known = [step.name for step in steps]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"no step {unknown[0]}: choose from {' '.join(known)}")
    if names:
        wanted = set(names) | ({"te_install"} if any(name.startswith("te_") for name in names) else set())
        return [step for step in steps if step.name in wanted]
    has_te = (folders.wheels / "te").is_dir()
    return [step for step in steps if has_te or not step.name.startswith("te_")]


def heading() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, tiny sizes"
    now = datetime.now(timezone.utc)
    return f"GPU check, {now:%Y-%m-%d %H:%M} UTC: {device}, torch {torch.__version__}"


class Check:
    """The steps of one call and what is known of them."""

    def __init__(self, folders: Folders, seconds: float) -> None:
        self.folders, self.deadline = folders, time.monotonic() + seconds
        self.results: list[StepResult] = []
        self.running: list[RunningStep] = []
        self.heading = heading()

    def start(self, step: Step) -> RunningStep:
        running = RunningStep(step, self.folders, min(step.seconds, self.deadline - time.monotonic()))
        self.running.append(running)
        return running

    def report(self, result: StepResult) -> None:
        self.results.append(result)
        line = f"=== {result.name}: {result.status} after {result.seconds:.0f} s {result.note}"
        print(line.rstrip(), flush=True)
        write_report(self.folders.out, self.results, read_findings(self.folders.findings), self.heading)

    def run(self, steps: Sequence[Step]) -> None:
        """Steps in the background first; the first step that needs them waits for them."""
        background = [self.start(step) for step in steps if step.in_background]
        for step in steps:
            if step.with_te and background:
                self.report(background.pop().result())
            if not step.in_background:
                self.report(self.run_step(step))
        for running in background:
            self.report(running.result())

    def run_step(self, step: Step) -> StepResult:
        if step.with_te and not any(each.name == "te_install" and each.status == "pass" for each in self.results):
            return StepResult(step.name, "skipped", 0, "Transformer Engine is not installed")
        left = self.deadline - time.monotonic()
        if left < MIN_SECONDS:
            return StepResult(step.name, "skipped", 0, "no time left")
        print(f"=== {step.name}, at most {min(step.seconds, left):.0f} s", flush=True)
        return self.start(step).result()

    def stop(self) -> None:
        for running in self.running:
            running.stop()


def interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@click.command()
@click.option(
    "--minutes",
    default=9.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="For all steps together.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu_check"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="For models and runs.")
@click.option("--wheels", type=click.Path(path_type=Path), default=Path(), help="Folder whose te/ holds the engine.")
@click.option("--tiny", is_flag=True, help="Tiny sizes, to see that the check itself runs; always so without CUDA.")
@click.argument("names", nargs=-1, metavar="[STEP]...")
def main(minutes: float, out: Path, work: Path, wheels: Path, tiny: bool, names: tuple[str, ...]) -> None:
    """Runs all steps, or those named, and writes OUT/report.md, report.json and log.txt. Exit code 1: a step failed."""
    tiny = tiny or not torch.cuda.is_available()
    folders = Folders(out.resolve(), work.resolve(), wheels.resolve())
    for folder in (folders.out, folders.work):
        folder.mkdir(parents=True, exist_ok=True)
    steps = chosen_steps(names, tiny, folders)
    folders.findings.write_text("")
    (folders.out / "log.txt").write_text("")
    signal.signal(signal.SIGTERM, interrupt)
    check = Check(folders, minutes * 60)
    try:
        check.run(steps)
    except KeyboardInterrupt:
        check.stop()
        raise
    counts = {status: sum(each.status == status for each in check.results) for status in ("pass", "fail", "skipped")}
    print(f"{counts['pass']} steps passed, {counts['fail']} failed, {counts['skipped']} skipped: {out}/report.md")
    sys.exit(1 if counts["fail"] else 0)


if __name__ == "__main__":
    main()
