"""The loss at three headline shapes, beside its rivals: what tools/bench/bench_fused_loss.py measures, with limits."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
import torch
import torch.distributed as dist

from tools.gpu.findings import ROOT, Recorder
from tools.gpu.liger_hopper import make_liger_hopper

sys.path.insert(0, str(ROOT / "tools" / "bench"))  # the benchmarks are scripts, which import their neighbours by name
import bench_fused_loss as bench
from fused_loss_report import EAGER, GEMM, Row, Shape, median, print_shape

# The head of a 32B model whole and as its share under TP 8, and that of a 1.5B model.
SHAPES = [Shape(8192, 152064, 5120, 1), Shape(8192, 152064, 5120, 8), Shape(16384, 151936, 1536, 1)]
TINY_SHAPES = [Shape(128, 1024, 64, 1)]

MEMORY_LIMIT = 1.5 * 2**30  # beyond inputs and gradients
FORWARD_SHARE = 0.92  # of torch.mm's rate
TRAINING_SHARE = 0.9  # of the rate of the products that the mode computes
PRODUCTS = {"ours, recompute": 4, "ours, eager": 3}  # forward and backward
HOPPER = "Liger, Hopper"  # starts NVSHMEM, so it gets a process of its own
FP8_SPEEDUP = 1.25  # of fp8_grad over bf16, forward and backward: with less it is not worth a setting


def record_methods(recorder: Recorder, shape: Shape, rows: dict[str, Row]) -> None:
    """Milliseconds of every method, and its ratio to torch."""
    eager = median(rows[EAGER].training_seconds) if EAGER in rows else 0.0
    for name, row in rows.items():
        if row.failure:
            recorder.skip(f"{shape}: {name}", row.failure)
            continue
        text = f"forward {median(row.forward_seconds) * 1e3:.1f} ms"
        if row.training_seconds:
            training = median(row.training_seconds)
            text += f", forward and backward {training * 1e3:.1f} ms, {row.training_bytes / 2**20:.0f} MiB"
            text += f", {training / eager:.2f} x torch eager" if eager else ""
            text += f", largest error {row.max_difference:.2g} nats"
        recorder.note(f"{shape}: {name}", text)


def record_limits(recorder: Recorder, shape: Shape, rows: dict[str, Row]) -> None:
    """Records whether our own methods keep to the limits."""
    product = median(rows[GEMM].forward_seconds)
    for name, products in PRODUCTS.items():
        if name not in rows or rows[name].failure:
            continue
        row = rows[name]
        share = product / median(row.forward_seconds)
        recorder.check(f"{shape}: {name}, forward / torch.mm", share, share >= FORWARD_SHARE, f">= {FORWARD_SHARE}")
        share = products * product / median(row.training_seconds)
        label = f"{shape}: {name}, forward and backward / {products} torch.mm"
        recorder.check(label, share, share >= TRAINING_SHARE, f">= {TRAINING_SHARE}")
        peak = row.training_bytes
        recorder.check(f"{shape}: {name}, memory", peak / 2**20, peak <= MEMORY_LIMIT, "<= 1536", "MiB")
    pair = [rows[name] for name in ("ours, recompute", "ours, fp8_grad") if name in rows and not rows[name].failure]
    if len(pair) == 2:
        ratio = median(pair[0].training_seconds) / median(pair[1].training_seconds)
        recorder.check(f"{shape}: fp8_grad over bf16", ratio, ratio >= FP8_SPEEDUP, f">= {FP8_SPEEDUP}", "times")


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="loss")
@click.option("--tiny", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Gets the raw numbers, as JSON.")
@click.option("--seconds", default=60.0, help="Of measuring, in all.")
@click.option("--method", "methods", multiple=True, help="Default: all but the one that may end the process.")
def main(findings: Path, step: str, tiny: bool, out: Path, seconds: float, methods: tuple[str, ...]) -> None:
    """Measures every method beside torch, and ours against the limits; what a shape gives is known when it ends."""
    recorder = Recorder(findings, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = methods or tuple(bench.MAKERS)
    bench.MAKERS[HOPPER] = make_liger_hopper
    made, skipped = bench.make_methods(names, device)
    for name, reason in skipped.items():
        recorder.skip(name, reason)
    measured: list[Row] = []
    for shape, deadline in bench.deadlines(TINY_SHAPES if tiny else SHAPES, seconds):
        found = bench.measure(shape, made, device, 1 if tiny else 5, "wall", deadline)
        print_shape(shape, found)
        measured += found
        result = {"machine": bench.describe_machine(device), "skipped": skipped}
        out.write_text(json.dumps(result | {"rows": [asdict(row) for row in measured]}) + "\n")
        rows = {row.method: row for row in found}
        record_methods(recorder, shape, rows)
        if GEMM in rows and device.type == "cuda":
            record_limits(recorder, shape, rows)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
