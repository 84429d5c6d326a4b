"""What this GPU reaches by itself: matrix products and copies. The other steps are measured against it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

from tools.gpu.findings import Recorder

Shape = tuple[int, int, int]  # rows, columns and inner size of a matrix product
# A square product, a tile of a 32B model's head, a tile of a 1.5B model's head.
SHAPES: list[Shape] = [(8192, 8192, 8192), (8192, 9504, 5120), (7008, 9504, 1536)]
TINY_SHAPES: list[Shape] = [(128, 128, 128)]


def seconds_of(run: Callable[[], object], repeats: int = 20) -> float:
    """Mean of `repeats` runs, after three to warm up."""
    for _ in range(3):
        run()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def rate(run: Callable[[], object], flops: int) -> float:
    """TFLOP/s."""
    return round(flops / seconds_of(run) / 1e12, 3)


def products(shape: Shape, device: torch.device) -> dict[str, Callable[[], object]]:
    """The products that the project rests on, by name; a CPU has the first alone."""
    rows, columns, inner = shape
    left, right = (torch.randn(size, inner, device=device).bfloat16() for size in (rows, columns))
    runs: dict[str, Callable[[], object]] = {"bf16": lambda: left @ right.T}
    if device.type == "cpu":
        return runs
    grad = torch.randn(rows, columns, device=device).bfloat16()
    total = torch.zeros(columns, inner, device=device)
    runs["bf16, float32 result"] = lambda: torch.mm(left, right.T, out_dtype=torch.float32)
    runs["bf16, added to float32"] = lambda: torch.addmm(total, grad.T, left, out_dtype=torch.float32, out=total)
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=device)
        left8, right8 = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn)
        for name, fast in (("fast", True), ("exact", False)):
            product = partial(torch._scaled_mm, left8, right8.T, one, one, use_fast_accum=fast)
            runs[f"FP8, {name} sums"] = partial(product, out_dtype=torch.bfloat16)
    return runs


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="ceilings")
@click.option("--tiny", is_flag=True)
def main(findings: Path, step: str, tiny: bool) -> None:
    """Records TFLOP/s of products on random data, and GB/s of a copy within the device (read and written)."""
    recorder = Recorder(findings, step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shape in TINY_SHAPES if tiny else SHAPES:
        rows, columns, inner = shape
        flops = 2 * rows * columns * inner
        for name, run in products(shape, device).items():
            label = f"{name}, {rows} x {columns} x {inner}, TFLOP/s"
            recorder.attempt(label, partial(rate, run, flops))
    num_bytes = 2**24 if tiny else 2**32
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    recorder.attempt(
        f"copy of {num_bytes / 2**30:.2g} GiB, GB/s",
        lambda: round(2 * num_bytes / seconds_of(lambda: target.copy_(source), 5) / 1e9),
    )


if __name__ == "__main__":
    main()
