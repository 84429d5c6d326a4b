"""The loss at three headline shapes, beside its rivals: tools/bench/bench_fused_loss.py with checks on its result."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from tools.bench import bench_fused_loss as bench
from tools.gpu.findings import Recorder

MEMORY_LIMIT = 1.5 * 2**30  # beyond inputs and gradients
FORWARD_SHARE = 0.92  # of torch.mm's rate
TRAINING_SHARE = 0.9  # of the rate of the products that the mode computes
PRODUCTS = {"ours, recompute": 4, "ours, eager": 3}  # forward and backward
HOPPER = "Liger, Hopper"  # starts NVSHMEM, so it gets a process of its own
FP8_SPEEDUP = 1.25  # of fp8_grad over bf16, forward and backward: with less it is not worth a setting


def median_of(row: dict[str, Any] | None, kind: str) -> float:
    return statistics.median(row[kind]) if row and row[kind] else 0.0


def record_shape(recorder: Recorder, shape: str, rows: dict[str, dict[str, Any]], judged: bool) -> None:
    """Milliseconds of every method, and whether ours keep to the limits."""
    product = median_of(rows.get(bench.GEMM), "forward_seconds")
    eager = median_of(rows.get(bench.EAGER), "training_seconds")
    for name, row in rows.items():
        if row["failure"]:
            recorder.skip(f"{shape}: {name}", row["failure"])
            continue
        forward, training = median_of(row, "forward_seconds"), median_of(row, "training_seconds")
        text = f"forward {forward * 1e3:.1f} ms"
        if training:
            text += f", forward and backward {training * 1e3:.1f} ms, {row['training_bytes'] / 2**20:.0f} MiB"
        if training and eager:
            text += f", {training / eager:.2f} x torch eager"
        recorder.note(f"{shape}: {name}", text)
    if not judged or not product:
        return
    for name, products in PRODUCTS.items():
        if name not in rows or rows[name]["failure"]:
            continue
        row = rows[name]
        share = product / median_of(row, "forward_seconds")
        recorder.check(f"{shape}: {name}, forward / torch.mm", share, share >= FORWARD_SHARE, f">= {FORWARD_SHARE}")
        share = products * product / median_of(row, "training_seconds")
        label = f"{shape}: {name}, forward and backward / {products} torch.mm"
        recorder.check(label, share, share >= TRAINING_SHARE, f">= {TRAINING_SHARE}")
        peak = row["training_bytes"]
        recorder.check(f"{shape}: {name}, memory", peak / 2**20, peak <= MEMORY_LIMIT, "<= 1536", "MiB")
    ours, fp8 = (median_of(rows.get(name), "training_seconds") for name in ("ours, recompute", "ours, fp8_grad"))
    if ours and fp8:
        recorder.check(f"{shape}: fp8_grad over bf16", ours / fp8, ours / fp8 >= FP8_SPEEDUP, f">= {FP8_SPEEDUP}")


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="loss")
@click.option("--tiny", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Gets the raw numbers, as JSON.")
@click.option("--seconds", default=60.0, help="Of measuring, in all.")
@click.option("--method", "methods", multiple=True, help="Default: all but the one that may end the process.")
def main(findings: Path, step: str, tiny: bool, out: Path, seconds: float, methods: tuple[str, ...]) -> None:
    """Runs the benchmark, then records every method beside torch, and ours beside the limits."""
    recorder = Recorder(findings, step)
    grid = "tiny" if tiny else "headline"
    arguments = ["--grid", grid, "--rounds", "1" if tiny else "5", "--time-limit", str(seconds)]
    names = methods or [name for name in bench.MAKERS if name != HOPPER]
    arguments += [argument for name in names for argument in ("--method", name)]
    with tempfile.TemporaryDirectory() as folder:
        bench.main([*arguments, "--out", str(Path(folder) / "loss")], standalone_mode=False)
        text = (Path(folder) / "loss.json").read_text()
    out.write_text(text)
    result = json.loads(text)
    for name, reason in result["skipped"].items():
        recorder.skip(name, reason)
    shapes = list(dict.fromkeys(str(bench.Shape(**row["shape"])) for row in result["rows"]))
    for shape in shapes:
        rows = {row["method"]: row for row in result["rows"] if str(bench.Shape(**row["shape"])) == shape}
        record_shape(recorder, shape, rows, judged=torch.cuda.is_available())


if __name__ == "__main__":
    main()
