"""Implements the passes over a tile of logits that are not matrix products, for CUDA; each reads the tile once.

The functions have the signatures and the meaning of those in torch_rows.py. Import this module only if Triton is
installed. With TRITON_INTERPRET=1, set before the import, it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_oreal.kernels.torch_rows import SHIFT_COLUMNS, Exponentials

BLOCK = SHIFT_COLUMNS  # columns that a program looks at, at a time
NUM_WARPS = 8
# Rows of one program in kernels that also write the transpose, in which they are 128 contiguous bytes of e4m3.
TRANSPOSE_ROWS = 128
TRANSPOSE_COLUMNS = 64
E4M3_MAX = tl.constexpr(448.0)
# The smallest normal float32. Triton holds a smaller constant in float64, which only version 3.9 and later convert to
# e4m3.
SMALLEST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def reduce_kernel(
    logits: tl.tensor,  # [num_rows, num_columns]
    row_stride: int,
    target: tl.tensor,  # [num_rows] int64, column of the tile
    numbers: tl.tensor,  # [3 or 4, num_rows] float32
    kept: tl.tensor,  # [num_rows, num_columns] bfloat16; with KEEPS
    kept_stride: int,
    shifts: tl.tensor,  # [num_rows, num_columns / BLOCK] float32; with KEEPS
    shifts_stride: int,
    num_rows: int,
    num_columns: int,
    num_valid: int,
    inverse_temperature: float,
    WITH_ENTROPY: tl.constexpr,
    KEEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    # Finite, so that an empty sum times its factor is 0, not NaN. The maximum can skip a NaN, but the sums keep it.
    maximum = -3.0e38
    sums = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < num_valid
        values = tl.load(logits + columns, mask=columns < num_columns, other=0.0).to(tl.float32) * inverse_temperature
        values = tl.where(inside, values, float("-inf"))
        higher = tl.maximum(maximum, tl.max(values, axis=0))
        rescale = tl.exp(maximum - higher)
        shifted = values - higher
        exponentials = tl.exp(shifted)
        if WITH_ENTROPY:
            weighted = (weighted + (maximum - higher) * sums) * rescale
            weighted += tl.where(inside, exponentials * shifted, 0.0)
        sums = sums * rescale + exponentials
        maximum = higher
        if KEEPS:
            place = kept + row * kept_stride + columns
            tl.store(place, exponentials.to(kept.dtype.element_ty), mask=columns < num_columns)
            tl.store(shifts + row * shifts_stride + start // BLOCK, higher)
    column = tl.load(target + row)
    is_here = (column >= 0) & (column < num_valid)
    target_logit = tl.load(logits + column, mask=is_here, other=float("-inf")).to(tl.float32) * inverse_temperature
    tl.store(numbers + row, maximum)
    tl.store(numbers + num_rows + row, tl.sum(sums, axis=0))
    tl.store(numbers + 2 * num_rows + row, target_logit)
    if WITH_ENTROPY:
        tl.store(numbers + 3 * num_rows + row, tl.sum(weighted, axis=0))


@triton.jit
def gradient_kernel(
    logits: tl.tensor,  # [rows, num_columns]
    row_stride: int,
    gradient: tl.tensor,  # [rows, num_columns], may be the logits
    gradient_stride: int,
    target: tl.tensor,  # these are [rows]
    logsumexp: tl.tensor,
    entropy: tl.tensor,
    onehot_scale: tl.tensor,
    probs_scale: tl.tensor,
    entropy_scale: tl.tensor,
    num_columns: int,
    num_valid: int,
    inverse_temperature: float,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_valid
    values = tl.load(logits + row * row_stride + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    shifted = values * inverse_temperature - tl.load(logsumexp + row)
    scale = tl.load(probs_scale + row)
    if WITH_ENTROPY:
        scale -= tl.load(entropy_scale + row) * (shifted + tl.load(entropy + row))
    grads = tl.exp(shifted) * scale + tl.where(columns == tl.load(target + row), tl.load(onehot_scale + row), 0.0)
    grads = tl.where(inside, grads, 0.0)
    place = gradient + row * gradient_stride + columns
    tl.store(place, grads, mask=columns < num_columns)


@triton.jit
def kept_gradient_kernel(
    kept: tl.tensor,  # [rows, num_columns] bfloat16
    kept_stride: int,
    shifts: tl.tensor,  # [rows, num_columns / BLOCK] float32
    shifts_stride: int,
    gradient: tl.tensor,  # [rows, num_columns], may be the memory of the exponentials
    gradient_stride: int,
    target: tl.tensor,  # these are [rows]
    logsumexp: tl.tensor,
    entropy: tl.tensor,
    onehot_scale: tl.tensor,
    probs_scale: tl.tensor,
    entropy_scale: tl.tensor,
    num_columns: int,
    num_valid: int,
    WITH_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_valid
    exponentials = tl.load(kept + row * kept_stride + columns, mask=columns < num_columns, other=0.0).to(tl.float32)
    lower = tl.load(shifts + row * shifts_stride + tl.program_id(1)) - tl.load(logsumexp + row)
    scale = tl.load(probs_scale + row)
    if WITH_ENTROPY:
        surprise = tl.log(tl.maximum(exponentials, SMALLEST_NORMAL)) + lower + tl.load(entropy + row)
        scale -= tl.load(entropy_scale + row) * surprise
    grads = exponentials * tl.exp(lower) * scale
    grads += tl.where(columns == tl.load(target + row), tl.load(onehot_scale + row), 0.0)
    grads = tl.where(inside, grads, 0.0)
    place = gradient + row * gradient_stride + columns
    tl.store(place, grads.to(gradient.dtype.element_ty), mask=columns < num_columns)


@triton.jit
def widened(values: tl.tensor) -> tl.tensor:
    """Converts bfloat16 to float32 by moving its bits.

    With one conversion, Triton 3.6 moves the transposition of the results up to it, and computes everything twice, once
    in each layout: three times the registers, some of them spilled. It does not do so with two conversions.
    """
    bits = values.to(tl.uint16, bitcast=True)
    return ((bits >> 8).to(tl.uint32) << 24 | (bits & 255).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def opaque(values: tl.tensor) -> tl.tensor:
    """Returns the same e4m3 values; hides from the compiler that they are also stored in another order.

    Without this, LLVM packs the bytes of both orders together and leaves parts of registers undefined, and ptxas 12.8
    fills three columns in eight of the transposed matrix with such parts. Triton's interpreter has no assembly.
    """
    bits = values.to(tl.uint8, bitcast=True)
    bits = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [bits], dtype=tl.uint8, is_pure=True, pack=4)
    return bits.to(values.dtype, bitcast=True)


@triton.jit
def fp8_gradient_kernel(
    kept: tl.tensor,  # [num_rows, num_columns] bfloat16
    kept_stride: int,
    shifts: tl.tensor,  # [num_rows, num_columns / SHIFT_COLUMNS] float32
    shifts_stride: int,
    gradient: tl.tensor,  # [stored_rows, stored_columns] e4m3
    gradient_stride: int,
    transposed: tl.tensor,  # [stored_columns, stored_rows] e4m3
    transposed_stride: int,
    target: tl.tensor,  # these are [num_rows]
    logsumexp: tl.tensor,
    entropy: tl.tensor,
    onehot_scale: tl.tensor,
    probs_scale: tl.tensor,
    entropy_scale: tl.tensor,
    bounds: tl.tensor,
    num_rows: int,
    num_columns: int,
    num_valid: int,
    stored_rows: int,  # multiples of 16, so that 16 bytes are stored at a time
    stored_columns: int,
    WITH_ENTROPY: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SHIFT_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    first_row = tl.program_id(1) * ROWS
    first_column = tl.program_id(0) * COLUMNS
    # Offsets within a program's part fit into 32 bits.
    local_rows, local_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows, columns = first_row + local_rows, first_column + local_columns
    is_row = rows < num_rows
    kept += first_row.to(tl.int64) * kept_stride + first_column
    exponentials = tl.load(
        kept + local_rows[:, None] * kept_stride + local_columns[None, :],
        mask=is_row[:, None] & (columns < num_columns)[None, :],
        other=0.0,
    )
    exponentials = widened(exponentials)
    shift_column = first_column // SHIFT_COLUMNS  # the same for all columns of this program
    lower = tl.load(shifts + rows.to(tl.int64) * shifts_stride + shift_column, mask=is_row, other=0.0)
    lower -= tl.load(logsumexp + rows, mask=is_row, other=0.0)
    unit = E4M3_MAX / tl.load(bounds + rows, mask=is_row, other=1.0)
    factor = tl.exp(lower) * unit
    probs_factor = factor * tl.load(probs_scale + rows, mask=is_row, other=0.0)
    grads = exponentials * probs_factor[:, None]
    if WITH_ENTROPY:
        entropy_factor = factor * tl.load(entropy_scale + rows, mask=is_row, other=0.0)
        constant = lower + tl.load(entropy + rows, mask=is_row, other=0.0)
        surprise = tl.log(tl.maximum(exponentials, SMALLEST_NORMAL)) + constant[:, None]
        grads -= exponentials * entropy_factor[:, None] * surprise
    onehot = unit * tl.load(onehot_scale + rows, mask=is_row, other=0.0)
    column = tl.load(target + rows, mask=is_row, other=-1)
    column = tl.where(column < num_valid, column - first_column, -1).to(tl.int32)
    grads += tl.where(local_columns[None, :] == column[:, None], onehot[:, None], 0.0)
    quantized = tl.where(is_row[:, None] & (columns < num_valid)[None, :], grads, 0.0).to(gradient.dtype.element_ty)
    gradient += first_row.to(tl.int64) * gradient_stride + first_column
    is_row, is_column = rows < stored_rows, columns < stored_columns
    places = gradient + local_rows[:, None] * gradient_stride + local_columns[None, :]
    tl.store(places, quantized, mask=is_row[:, None] & is_column[None, :])
    transposed += first_column.to(tl.int64) * transposed_stride + first_row
    places = transposed + local_columns[:, None] * transposed_stride + local_rows[None, :]
    if not INTERPRETED:
        quantized = opaque(quantized)
    tl.store(places, tl.trans(quantized), mask=is_column[:, None] & is_row[None, :])


@triton.jit
def cast_transpose_kernel(
    matrix: tl.tensor,  # [num_rows, num_columns]
    matrix_stride: int,
    factors: tl.tensor,  # [num_rows] float32; with HAS_FACTORS
    scale: tl.tensor,  # one float32
    transposed: tl.tensor,  # [stored_columns, stored_rows] e4m3
    transposed_stride: int,
    num_rows: int,
    num_columns: int,
    stored_rows: int,  # multiples of 16
    stored_columns: int,
    HAS_FACTORS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    first_row = tl.program_id(1) * ROWS
    first_column = tl.program_id(0) * COLUMNS
    local_rows, local_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    rows, columns = first_row + local_rows, first_column + local_columns
    is_row = rows < num_rows
    matrix += first_row.to(tl.int64) * matrix_stride + first_column
    values = tl.load(
        matrix + local_rows[:, None] * matrix_stride + local_columns[None, :],
        mask=is_row[:, None] & (columns < num_columns)[None, :],
        other=0.0,
    ).to(tl.float32)
    factor = 1.0 / tl.load(scale)
    if HAS_FACTORS:
        values *= (tl.load(factors + rows, mask=is_row, other=0.0) * factor)[:, None]
    else:
        values *= factor
    quantized = values.to(transposed.dtype.element_ty)
    transposed += first_column.to(tl.int64) * transposed_stride + first_row
    places = transposed + local_columns[:, None] * transposed_stride + local_rows[None, :]
    mask = (columns < stored_columns)[:, None] & (rows < stored_rows)[None, :]
    tl.store(places, tl.trans(quantized), mask=mask)


def block_of(num_columns: int) -> int:
    return int(min(BLOCK, triton.next_power_of_2(max(num_columns, 1))))


def reduce_rows(
    logits: Tensor,
    target: Tensor,
    num_valid: int,
    temperature: float,
    with_entropy: bool,
    kept: Exponentials | None = None,
) -> Tensor:
    num_rows, num_columns = logits.shape
    numbers = torch.empty(4 if with_entropy else 3, num_rows, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current device; CPU tensors do not change it
        reduce_kernel[(num_rows,)](
            logits,
            logits.stride(0),
            target,
            numbers,
            numbers if kept is None else kept.values,
            0 if kept is None else kept.values.stride(0),
            numbers if kept is None else kept.shifts,
            0 if kept is None else kept.shifts.stride(0),
            num_rows,
            num_columns,
            num_valid,
            1 / temperature,
            WITH_ENTROPY=with_entropy,
            KEEPS=kept is not None,
            BLOCK=block_of(num_columns),
            num_warps=NUM_WARPS,
        )
    return numbers


def gradient_rows(
    logits: Tensor,
    target: Tensor,
    num_valid: int,
    temperature: float,
    logsumexp: Tensor,
    entropy: Tensor | None,
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    num_rows, num_columns = logits.shape
    onehot_scale, probs_scale, entropy_scale = scales.contiguous().unbind()
    gradient = logits if dtype is logits.dtype else torch.empty_like(logits, dtype=dtype)
    block = block_of(num_columns)
    with torch.cuda.device_of(logits):
        gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
            logits,
            logits.stride(0),
            gradient,
            gradient.stride(0),
            target,
            logsumexp,
            logsumexp if entropy is None else entropy,
            onehot_scale,
            probs_scale,
            entropy_scale,
            num_columns,
            num_valid,
            1 / temperature,
            WITH_ENTROPY=entropy is not None,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )
    return gradient


def gradient_of_kept(
    kept: Exponentials,
    target: Tensor,
    num_valid: int,
    logsumexp: Tensor,
    entropy: Tensor | None,
    scales: Tensor,
    out: Tensor,
) -> None:
    num_rows, num_columns = out.shape
    onehot_scale, probs_scale, entropy_scale = scales.contiguous().unbind()
    block = block_of(num_columns)
    with torch.cuda.device_of(out):
        kept_gradient_kernel[(num_rows, triton.cdiv(num_columns, block))](
            kept.values,
            kept.values.stride(0),
            kept.shifts,
            kept.shifts.stride(0),
            out,
            out.stride(0),
            target,
            logsumexp,
            logsumexp if entropy is None else entropy,
            onehot_scale,
            probs_scale,
            entropy_scale,
            num_columns,
            num_valid,
            WITH_ENTROPY=entropy is not None,
            BLOCK=block,
            num_warps=NUM_WARPS,
        )


def fp8_gradient_of_kept(
    kept: Exponentials,
    target: Tensor,
    num_valid: int,
    logsumexp: Tensor,
    entropy: Tensor | None,
    scales: Tensor,
    bounds: Tensor,
    out: Tensor,
    transposed: Tensor,
) -> None:
    num_rows, num_columns = kept.values.shape
    stored_rows, stored_columns = out.shape
    assert transposed.shape == (stored_columns, stored_rows)
    onehot_scale, probs_scale, entropy_scale = scales.contiguous().unbind()
    grid = (triton.cdiv(stored_columns, TRANSPOSE_COLUMNS), triton.cdiv(stored_rows, TRANSPOSE_ROWS))
    with torch.cuda.device_of(out):
        fp8_gradient_kernel[grid](
            kept.values,
            kept.values.stride(0),
            kept.shifts,
            kept.shifts.stride(0),
            out,
            out.stride(0),
            transposed,
            transposed.stride(0),
            target,
            logsumexp,
            logsumexp if entropy is None else entropy,
            onehot_scale,
            probs_scale,
            entropy_scale,
            bounds,
            num_rows,
            num_columns,
            num_valid,
            stored_rows,
            stored_columns,
            WITH_ENTROPY=entropy is not None,
            INTERPRETED=not out.is_cuda,
            SHIFT_COLUMNS=SHIFT_COLUMNS,
            ROWS=TRANSPOSE_ROWS,
            COLUMNS=TRANSPOSE_COLUMNS,
            num_warps=NUM_WARPS,
        )


def cast_transpose(matrix: Tensor, factors: Tensor | None, scale: Tensor, out: Tensor) -> None:
    num_rows, num_columns = matrix.shape
    stored_columns, stored_rows = out.shape
    grid = (triton.cdiv(stored_columns, TRANSPOSE_COLUMNS), triton.cdiv(stored_rows, TRANSPOSE_ROWS))
    with torch.cuda.device_of(matrix):
        cast_transpose_kernel[grid](
            matrix,
            matrix.stride(0),
            scale if factors is None else factors,
            scale,
            out,
            out.stride(0),
            num_rows,
            num_columns,
            stored_rows,
            stored_columns,
            HAS_FACTORS=factors is not None,
            ROWS=TRANSPOSE_ROWS,
            COLUMNS=TRANSPOSE_COLUMNS,
            num_warps=NUM_WARPS,
        )
