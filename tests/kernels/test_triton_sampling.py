"""The Triton sampler without a GPU: interpreted against the definition, and compiled for a Hopper GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton")

WORKER = "tests.support.workers.triton_sampling_worker"
SIGNATURE = {
    "logits": "*fp32",
    "row_stride": "i32",
    "uniform": "*fp64",
    "token_ids": "*i64",
    "rollout_logprobs": "*fp32",
    "model_logprobs": "*fp32",
    "vocab_size": "i32",
    "inverse_temperature": "fp32",
    "top_k": "i32",
    "top_p": "i32",
}
FLAGS = ("HAS_TOP_K", "HAS_TOP_P", "IS_MODEL")


@pytest.mark.timeout(900)
def test_interpreted_it_agrees_with_the_sort() -> None:
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


@pytest.mark.parametrize("truncates", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_for_hopper_nothing_spills(truncates: tuple[bool, bool], tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_oreal.kernels import triton_sampling

    source = ASTSource(
        fn=triton_sampling.sample_kernel,
        signature=SIGNATURE | dict.fromkeys((*FLAGS, "BLOCK"), "constexpr"),
        constexprs=dict(zip(FLAGS, (*truncates, not any(truncates)), strict=True)) | {"BLOCK": triton_sampling.BLOCK},
    )
    options = {"num_warps": triton_sampling.NUM_WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    cubin = tmp_path / "sample.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    usage = dict(part.split(":") for part in shown.stdout.split("Function sample_kernel:")[1].split() if ":" in part)
    assert int(usage["REG"]) <= 128
    assert int(usage["STACK"]) == int(usage["LOCAL"]) == 0  # where spilled registers would be
