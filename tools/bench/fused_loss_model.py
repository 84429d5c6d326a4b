"""Estimates the cost of linear_logprob's modes on a GPU: operations, bytes, and the fastest mode. It runs no kernel.

    python tools/bench/bench_fused_loss.py --model

A mode's time is that of its products at measured rates, plus that of the bytes which its other passes move at a
measured bandwidth, without overlap. linear_logprob itself makes the plans (blocks, and how many it keeps).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from megatron_oreal.kernels.blocks import TILE_BYTES, BlockPlan, BlockSizes
from megatron_oreal.kernels.fp8.gradients import SUM_BYTES, WEIGHT_BYTES
from megatron_oreal.kernels.tiles import CUDA_BYTES

Gradients = Literal["bf16", "fp8_grad"]


@dataclass(frozen=True, slots=True)
class Gpu:
    """The rates of single kernels, in operations and bytes a second."""

    name: str
    bytes_per_second: float
    float32_out: float = 788e12  # bf16 inputs, float32 result, as the logits need
    half_out: float = 844e12
    fp8: float = 1424e12
    num_processors: int = 132


# The rates are measured on an H200 on 2026-11-27 (8192 x 9504 x 5120); an H100 SXM has the same processors, and memory
# with 3.35 TB/s instead of 4.8.
GPUS = (Gpu("H100", 2.7e12), Gpu("H200", 3.9e12))


@dataclass(frozen=True, slots=True)
class Cost:
    """The operations and bytes of a forward and a backward pass."""

    mode: str
    blocks: str  # how many, and how many of them are kept
    half_operations: float  # of products with bf16 inputs
    float32_out_operations: float
    fp8_operations: float
    num_bytes: float  # of the passes that are not products

    def seconds(self, gpu: Gpu) -> float:
        products = (
            self.half_operations / gpu.half_out
            + self.float32_out_operations / gpu.float32_out
            + self.fp8_operations / gpu.fp8
        )
        return products + self.num_bytes / gpu.bytes_per_second


def cost_of(
    tokens: int, columns: int, hidden: int, gradients: Gradients, is_eager: bool, memory: int = CUDA_BYTES
) -> Cost:
    """`columns` are this rank's. The weight's gradient is bf16; a float32 main_grad moves more bytes in every mode."""
    is_fp8 = gradients == "fp8_grad"
    product, logits, weight = 2.0 * tokens * columns * hidden, float(tokens * columns), float(columns * hidden)
    plan = BlockPlan.choose(
        BlockSizes(
            tokens,
            columns,
            hidden,
            total_bytes=memory,
            fixed_bytes=max(min(WEIGHT_BYTES, columns * hidden), 3 * TILE_BYTES // 4 + SUM_BYTES) if is_fp8 else 0,
            token_bytes=(6 if is_fp8 else 4) * hidden,
            weight_bytes=2,
            num_processors=132,
            keeps=not is_eager,
        )
    )
    num_blocks = len(plan.tokens)
    num_again = 0 if is_eager else sum(rows.stop - rows.start for rows in plan.tokens[plan.num_kept :])
    again = num_again / tokens
    reduction = (4 + 2) * logits * (1 + again) - 2 * logits * again  # a discarded block writes nothing at first
    num_bytes = reduction + 4 * logits  # gradients: of 2 bytes, 2 bytes
    if is_fp8:
        chunks = ceil(weight / WEIGHT_BYTES)
        num_bytes += 2 * weight + 3 * weight * num_blocks  # its largest number; then cast and transposed, every block
        num_bytes += 12.0 * tokens * hidden * chunks + 8 * weight * (num_blocks - 1)
    else:
        num_bytes += 4 * weight * (num_blocks - 1)  # the sum is read and written by the product itself
    name = f"{gradients}, {'eager' if is_eager else 'recompute'}"
    return Cost(
        mode=name if memory == CUDA_BYTES else f"{name}, {memory / 2**30:.0f} GiB",
        blocks=f"{num_blocks}" if is_eager else f"{num_blocks}, {plan.num_kept} kept",
        half_operations=0.0 if is_fp8 else 2 * product,
        float32_out_operations=product * (1 + again),
        fp8_operations=2 * product if is_fp8 else 0.0,
        num_bytes=num_bytes,
    )


def costs(tokens: int, columns: int, hidden: int) -> list[Cost]:
    product, logits = 2.0 * tokens * columns * hidden, float(tokens * columns)
    # torch: to float32 (2 read, 4 written), log_softmax (4, 4), its backward pass (4 of zeros, 8, 4), to bf16 (4, 2).
    eager = Cost("torch eager", "", 3 * product, 0.0, 0.0, 36 * logits)
    floor = Cost("three products alone", "", 3 * product, 0.0, 0.0, 0.0)
    ours = [
        cost_of(tokens, columns, hidden, gradients, is_eager, memory)
        for gradients in ("bf16", "fp8_grad")
        for is_eager, memory in ((False, CUDA_BYTES), (False, 3 * 2**30), (True, CUDA_BYTES))
    ]
    return [floor, eager, *ours]


def report(tokens: int, columns: int, hidden: int) -> list[str]:
    """Returns a table for one shape, and a sentence that names the fastest mode."""
    rows = costs(tokens, columns, hidden)
    heading = f"{'':28s}{'blocks':>12s}{'bf16':>9s}{'fp32 out':>10s}{'fp8':>8s}{'bytes':>9s}"
    lines = [
        f"T {tokens}, V {columns} a rank, H {hidden}: 10^12 operations of products, GB of the other passes, ms",
        heading + "".join(f"{gpu.name:>9s}" for gpu in GPUS),
    ]
    for row in rows:
        operations = row.half_operations, row.float32_out_operations, row.fp8_operations
        shown = "".join(f"{value / 1e12:{width}.1f}" for value, width in zip(operations, (9, 10, 8), strict=True))
        times = "".join(f"{row.seconds(gpu) * 1e3:9.1f}" for gpu in GPUS)
        lines.append(f"{row.mode:28s}{row.blocks:>12s}{shown}{row.num_bytes / 1e9:9.1f}{times}")
    for gpu in GPUS:
        seconds = {row.mode: row.seconds(gpu) for row in rows[1:]}
        winner = min(seconds, key=seconds.__getitem__)
        ratio = seconds["bf16, recompute"] / seconds["fp8_grad, recompute"]
        verdict = "can win" if ratio > 1 else "cannot win"
        lines.append(
            f"{gpu.name}: {winner} should be the fastest; fp8_grad {verdict}: {ratio:.2f}x the speed of bf16, recompute"
        )
    return lines
