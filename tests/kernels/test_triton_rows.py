"""The Triton row kernels without a GPU: interpreted against float64, and compiled for a Hopper GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_oreal.kernels.torch_rows import SHIFT_COLUMNS
from tests.support.paths import ROOT

pytest.importorskip("triton")

WORKER = "tests.support.workers.triton_rows_worker"


def test_interpreted_they_agree_with_float64() -> None:
    """In a process of its own: Triton reads the variable when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", WORKER],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]
    assert run.stdout == "passed\n"


UPSTREAM = {
    "target": "*i64",
    "logsumexp": "*fp32",
    "entropy": "*fp32",
    "onehot_scale": "*fp32",
    "probs_scale": "*fp32",
    "entropy_scale": "*fp32",
}
KEPT = {"kept": "*bf16", "kept_stride": "i32", "shifts": "*fp32", "shifts_stride": "i32"}
WHOLE_ROWS = {"BLOCK": SHIFT_COLUMNS}
TRANSPOSED = {"ROWS": 128, "COLUMNS": 64}
# Signature and constants: all have `WITH_ENTROPY` besides, but for the last.
KERNELS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "reduce_kernel": (
        {"logits": "*fp32", "row_stride": "i32", "target": "*i64", "numbers": "*fp32"}
        | KEPT
        | {"num_rows": "i32", "num_columns": "i32", "num_valid": "i32", "inverse_temperature": "fp32"},
        {"KEEPS": True} | WHOLE_ROWS,
    ),
    "gradient_kernel": (
        {"logits": "*fp32", "row_stride": "i32", "gradient": "*bf16", "gradient_stride": "i32"}
        | UPSTREAM
        | {"num_columns": "i32", "num_valid": "i32", "inverse_temperature": "fp32"},
        WHOLE_ROWS,
    ),
    "kept_gradient_kernel": (
        KEPT | {"gradient": "*bf16", "gradient_stride": "i32"} | UPSTREAM | {"num_columns": "i32", "num_valid": "i32"},
        WHOLE_ROWS,
    ),
    "fp8_gradient_kernel": (
        KEPT
        | {"gradient": "*fp8e4nv", "gradient_stride": "i32", "transposed": "*fp8e4nv", "transposed_stride": "i32"}
        | UPSTREAM
        | {"bounds": "*fp32", "num_rows": "i32", "num_columns": "i32", "num_valid": "i32"}
        | {"stored_rows": "i32", "stored_columns": "i32"},
        {"SHIFT_COLUMNS": SHIFT_COLUMNS} | TRANSPOSED,
    ),
    "cast_transpose_kernel": (
        {
            "matrix": "*bf16",
            "matrix_stride": "i32",
            "factors": "*fp32",
            "scale": "*fp32",
            "transposed": "*fp8e4nv",
            "transposed_stride": "i32",
            "num_rows": "i32",
            "num_columns": "i32",
            "stored_rows": "i32",
            "stored_columns": "i32",
        },
        {"HAS_FACTORS": True} | TRANSPOSED,
    ),
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_hopper_nothing_spills(name: str, with_entropy: bool, tmp_path: Path) -> None:
    """At most 128 registers a thread: two blocks of 256 threads, or more, on each multiprocessor at a time.

    Pointers, strides and columns are multiples of 16, as for real models; tokens and valid columns are any number.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_oreal.kernels import triton_rows

    assert (triton_rows.TRANSPOSE_ROWS, triton_rows.TRANSPOSE_COLUMNS) == (128, 64)
    signature, constants = KERNELS[name]
    if "HAS_FACTORS" not in constants:
        constants = constants | {"WITH_ENTROPY": with_entropy}
    arguments = [
        index
        for index, (argument, kind) in enumerate(signature.items())
        if kind.startswith("*") or argument.endswith(("stride", "columns")) or argument == "stored_rows"
    ]
    attrs = {(index,): [["tt.divisibility", 16]] for index in arguments}
    source = ASTSource(
        fn=getattr(triton_rows, name),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs=attrs,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_rows.NUM_WARPS})
    cubin = tmp_path / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    usage = dict(part.split(":") for part in shown.stdout.split(f"Function {name}:")[1].split() if ":" in part)
    assert int(usage["REG"]) <= 128
    assert int(usage["STACK"]) == int(usage["LOCAL"]) == 0  # where spilled registers would be
    assert not re.search(r"(ld|st)\.global\.b(8|16)\b", compiled.asm["ptx"])  # no element by itself
