"""Where one small update spends the GPU's time, and where it makes the host wait for the GPU."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import click
import torch
from torch.profiler import ProfilerActivity, profile

from tools.gpu.findings import ROOT, Recorder
from tools.gpu.model_run import ModelRun, opened
from tools.gpu.random_model import SHAPES

NUM_SHOWN = 20


def host_synchronizations(model: ModelRun, step: int) -> Counter[str]:
    """Waits of one update by place in the source; torch.cuda.synchronize itself is not among them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model.update(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return Counter(
        f"{place(warning.filename)}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)
    )


def place(filename: str) -> str:
    path = Path(filename)
    if path.is_relative_to(ROOT):
        return str(path.relative_to(ROOT))
    parts = path.parts
    return "/".join(parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:])


def operation_seconds(model: ModelRun, step: int) -> tuple[Counter[str], Counter[str], float]:
    """One update: seconds on the device (or, without one, on the CPU) and calls by operation, and its wall time.

    The raw events are summed here: torch's own key_averages builds a tree of all CPU events, which takes minutes.
    """
    on_cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        _, wall = model.update(step)
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    assert profiler.profiler is not None
    for event in profiler.profiler.kineto_results.events():
        if on_cuda == (event.device_type() == torch.autograd.DeviceType.CUDA):
            seconds[event.name()] += event.duration_ns() / 1e9
            calls[event.name()] += 1
    return seconds, calls, wall


def write_table(path: Path, title: str, rows: list[str]) -> None:
    with path.open("a") as file:
        file.write("\n".join([title, *rows, ""]) + "\n")


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="profile")
@click.option("--size", type=click.Choice(list(SHAPES)), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Text file with the whole tables.")
@click.option("--prompts", "num_prompts", default=12, help="12: one micro-batch of 16k tokens.")
@click.argument("settings", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def main(
    findings: Path, step: str, size: str, work: Path, out: Path, num_prompts: int, settings: tuple[str, ...]
) -> None:
    """Counts host synchronisations of one update, then profiles another."""
    recorder = Recorder(findings, step)
    with opened(size, work, num_prompts, settings) as model:
        for number in range(2):
            model.update(number)  # kernels are compiled and tuned
        if torch.cuda.is_available():
            waits = host_synchronizations(model, 2)
            recorder.note("host synchronisations of one update", waits.total())
            write_table(out, "host synchronisations", [f"{n:6d}  {where}" for where, n in waits.most_common()])
            for where, number in waits.most_common(8):
                recorder.note(f"host synchronisations at {where}", number)
        else:
            recorder.skip("host synchronisations", "torch finds no CUDA device")
        seconds, calls, wall = operation_seconds(model, 3)
    busy = seconds.total()
    recorder.note("one update", wall, "s")
    if torch.cuda.is_available():
        recorder.note("share of the time in which the GPU works", busy / wall)
    shown = [f"{s * 1e3:9.2f} ms  {s / busy:6.1%}  {calls[name]:6d}  {name}" for name, s in seconds.most_common()]
    write_table(out, f"operations of one update of {wall:.3f} s: time, share, calls", shown[:100])
    for name, value in seconds.most_common(NUM_SHOWN):
        recorder.note(name[:120], f"{value * 1e3:.2f} ms, {value / busy:.1%}, {calls[name]} calls")


if __name__ == "__main__":
    main()
