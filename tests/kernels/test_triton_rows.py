"""The Triton row kernels without a GPU: interpreted against float64, and compiled for a Hopper GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


KERNELS = {
    "reduce_kernel": {
        "logits": "*fp32",
        "row_stride": "i32",
        "target": "*i64",
        "numbers": "*fp32",
        "num_rows": "i32",
        "num_valid": "i32",
        "inverse_temperature": "fp32",
    },
    "gradient_kernel": {
        "logits": "*fp32",
        "row_stride": "i32",
        "gradient": "*bf16",
        "gradient_stride": "i32",
        "target": "*i64",
        "logsumexp": "*fp32",
        "entropy": "*fp32",
        "onehot_scale": "*fp32",
        "probs_scale": "*fp32",
        "entropy_scale": "*fp32",
        "num_columns": "i32",
        "num_valid": "i32",
        "inverse_temperature": "fp32",
    },
}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_hopper_nothing_spills(name: str, with_entropy: bool, tmp_path: Path) -> None:
    """At most 128 registers a thread: two blocks of 256 threads, or more, on each multiprocessor at a time."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_oreal.kernels import triton_rows

    source = ASTSource(
        fn=getattr(triton_rows, name),
        signature=KERNELS[name] | {"WITH_ENTROPY": "constexpr", "BLOCK": "constexpr"},
        constexprs={"WITH_ENTROPY": with_entropy, "BLOCK": triton_rows.BLOCK},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": triton_rows.NUM_WARPS})
    cubin = tmp_path / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    usage = dict(part.split(":") for part in shown.stdout.split(f"Function {name}:")[1].split() if ":" in part)
    assert int(usage["REG"]) <= 128
    assert int(usage["STACK"]) == int(usage["LOCAL"]) == 0  # where spilled registers would be
