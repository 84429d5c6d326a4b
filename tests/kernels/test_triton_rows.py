"""The Triton row kernels without a GPU: interpreted against float64, and compiled for a Hopper GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

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
WHOLE_ROWS: dict[str, object] = {"BLOCK": SHIFT_COLUMNS}
TRANSPOSED: dict[str, object] = {"ROWS": 128, "COLUMNS": 64}
# Signature and constants: all have `WITH_ENTROPY` besides, but for the last.
KERNELS: dict[str, tuple[dict[str, str], dict[str, object]]] = {
    "reduce_kernel": (
        {"logits": "*fp32", "row_stride": "i32", "target": "*i64", "numbers": "*fp32"}
        | KEPT
        | {"num_rows": "i32", "num_columns": "i32", "num_valid": "i32", "inverse_temperature": "fp32"},
        WHOLE_ROWS | {"KEEPS": True},
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
        TRANSPOSED | {"SHIFT_COLUMNS": SHIFT_COLUMNS, "INTERPRETED": False},
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
        TRANSPOSED | {"HAS_FACTORS": True},
    ),
}


# Other types and flags than those above that callers pass.
OTHERS: dict[str, list[dict[str, object]]] = {
    "reduce_kernel": [{"KEEPS": False, "kept": "*fp32"}],
    "gradient_kernel": [{"gradient": "*fp16"}, {"gradient": "*fp32"}],
    "kept_gradient_kernel": [{"gradient": "*fp16"}],
    "fp8_gradient_kernel": [],
    "cast_transpose_kernel": [{"matrix": "*fp16"}, {"HAS_FACTORS": False}],
}
SPECIALISATIONS: list[tuple[str, dict[str, object]]] = [(name, {}) for name in KERNELS] + [
    (name, other) for name in OTHERS for other in OTHERS[name]
]
REGISTER = r"%(?:r|rs|rd|p|f)\d+"
MEMORY = ("kept", "kept_stride", "gradient", "gradient_stride", "matrix", "matrix_stride")
E4M3_MEMORY = ("transposed", "transposed_stride", "stored_rows", "stored_columns")  # aligned at all sizes


def multiples_of_sixteen(signature: dict[str, str], sizes: str) -> list[str]:
    """Arguments that Triton compiles as such."""
    if sizes == "of real models":  # tokens and valid columns are any number
        ending = ("stride", "columns")
        return [n for n, kind in signature.items() if kind[0] == "*" or n.endswith(ending) or n == "stored_rows"]
    if sizes == "of a last tile":
        return [name for name in signature if name in MEMORY + E4M3_MEMORY]
    always = (*E4M3_MEMORY, "gradient", "gradient_stride") if "transposed" in signature else ()
    return [name for name in signature if name in always]


def compile_for_hopper(name: str, changes: dict[str, object], with_entropy: bool, sizes: str) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_oreal.kernels import triton_rows

    assert (triton_rows.TRANSPOSE_ROWS, triton_rows.TRANSPOSE_COLUMNS) == (128, 64)
    signature, constants = KERNELS[name]
    signature = signature | {key: str(kind) for key, kind in changes.items() if key in signature}
    constants = constants | {key: value for key, value in changes.items() if key in constants}
    if "HAS_FACTORS" not in constants:
        constants = constants | {"WITH_ENTROPY": with_entropy}
    if sizes == "one":  # Triton makes a constant of an argument that is 1
        ones = [n for n, kind in signature.items() if kind == "i32" and n not in (*MEMORY, *E4M3_MEMORY)]
        constants = constants | dict.fromkeys(ones, 1)
    names = list(signature)
    aligned = [each for each in multiples_of_sixteen(signature, sizes) if each not in constants]
    source = ASTSource(
        fn=getattr(triton_rows, name),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(names.index(each),): [["tt.divisibility", 16]] for each in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_rows.NUM_WARPS})


def resource_usage(compiled: Any, name: str, folder: Path) -> dict[str, str]:
    """Example: {"REG": "72", "STACK": "0", "LOCAL": "0", ...}."""
    import triton

    cubin = folder / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return dict(part.split(":") for part in shown.stdout.split(f"Function {name}:")[1].split() if ":" in part)


def undefined_registers(ptx: str) -> dict[str, str]:
    """Registers that are read and never written, each with an instruction that reads it.

    ptxas may take any other register for such a one, and has: the transposed FP8 gradients were wrong on a GPU.
    """
    read: dict[str, str] = {}
    written: set[str] = set()
    for line in ptx.splitlines():
        instruction = re.sub("//.*", "", line).strip().rstrip(";")
        match = re.match(r"(@!?%p\d+ +)?([a-z][\w.:]*)\s+(.*)$", instruction)
        if not match:
            continue
        guard, operation, operands = match[1] or "", match[2], match[3]
        given = ""
        if not operation.startswith(("st.", "bra", "bar.")):
            end = operands.index("}") if operands.startswith("{") else (operands + ",").index(",")
            given, operands = operands[:end], operands[end + 1 :]
        if operation == "prmt.b32":  # bytes of two registers; the digits of the number say which
            first, second, digits = operands.split(",")
            chosen = [digit & 7 for digit in (int(digits.strip().rstrip("U"), 16) >> shift for shift in (0, 4, 8, 12))]
            operands = first * any(digit < 4 for digit in chosen) + second * any(digit >= 4 for digit in chosen)
        written.update(re.findall(REGISTER, given))
        read |= dict.fromkeys(re.findall(REGISTER, guard + operands), instruction)
    return {register: instruction for register, instruction in read.items() if register not in written}


def test_an_undefined_register_is_found() -> None:
    ptx = """
        mov.u32 	%r1, %tid.x;
        ld.global.v2.b32 	{%r2, %r3}, [%rd1];
    @%p1 st.global.b32 	[%rd1], {%r2, %r4};  // %r5
        prmt.b32 	%r6, %r3, %r7, 0x3210U;
        prmt.b32 	%r6, %r8, %r3, 0x7654U;
        prmt.b32 	%r6, %r9, %r10, 0x3340U;
        ret;
    """
    assert set(undefined_registers(ptx)) == {"%rd1", "%p1", "%r4", "%r9", "%r10"}


@pytest.mark.parametrize(("name", "changes"), SPECIALISATIONS)
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("sizes", ["of real models", "of a last tile", "odd", "one"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_hopper_nothing_spills(
    name: str, changes: dict[str, object], with_entropy: bool, sizes: str, tmp_path: Path
) -> None:
    """For whatever callers pass. At most 128 registers a thread: two blocks or more on a multiprocessor at a time."""
    if with_entropy and "cast" in name:
        pytest.skip("it has no such flag")
    compiled = compile_for_hopper(name, changes, with_entropy, sizes)
    usage = resource_usage(compiled, name, tmp_path)
    assert int(usage["STACK"]) == int(usage["LOCAL"]) == 0  # where spilled registers would be
    assert "f64" not in compiled.asm["ttgir"]
    assert undefined_registers(compiled.asm["ptx"]) == {}
    assert int(usage["REG"]) <= 128
    if sizes == "of real models":
        assert not re.search(r"(ld|st)\.global\.b(8|16)\b", compiled.asm["ptx"])  # no element by itself
