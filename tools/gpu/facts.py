"""What the machine has: hardware, versions, and whether each part of the project can be imported."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
from functools import partial
from pathlib import Path

import click
import torch

from tools.gpu.findings import Recorder

PACKAGES = ("triton", "numpy", "transformers", "tokenizers", "safetensors", "pydantic", "megatron.core", "math_verify")
OPTIONAL_PACKAGES = ("liger_kernel", "liger_cute_kernels", "transformer_engine", "flash_attn", "apex")
MODULES = (
    "cli",
    "train",
    "kernels.linear_logprob",
    "kernels.triton_rows",
    "models.build",
    "engines.local.engine",
    "engines.sglang.engine",
    "evaluation.benchmark",
    "run.open",
)
GPU_QUERY = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def query_gpus() -> str:
    command = ["nvidia-smi", f"--query-gpu={GPU_QUERY}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()


def version_of(name: str) -> str:
    module = importlib.import_module(name)
    return str(getattr(module, "__version__", "present"))


def imported(name: str) -> str:
    importlib.import_module(name)
    return "imported"


def record_packages(recorder: Recorder) -> None:
    for name in PACKAGES:
        recorder.attempt(name, partial(version_of, name))
    for name in OPTIONAL_PACKAGES:
        try:
            recorder.note(name, version_of(name))
        except Exception as error:  # noqa: BLE001  # optional: whatever its import raises, it is not there
            recorder.skip(name, f"{type(error).__name__}: {str(error)[:120]}")


def adds_to_float32() -> str:
    left, right = (torch.ones(16, 16, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(16, 16, device="cuda")
    return str(torch.addmm(total, left, right, out_dtype=torch.float32).dtype)


def packed_attention() -> str:
    from megatron_oreal.models.attention import variable_length_attention

    return "torch's variable-length attention" if variable_length_attention() else "padded batches"


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="facts")
def main(findings: Path, step: str) -> None:
    """Records the environment; a module of the project that cannot be imported is a failed check."""
    recorder = Recorder(findings, step)
    recorder.note("python", platform.python_version())
    recorder.note("CPU cores", len(os.sched_getaffinity(0)))
    recorder.note("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    record_packages(recorder)
    for name in MODULES:
        recorder.attempt(f"import megatron_oreal.{name}", partial(imported, f"megatron_oreal.{name}"))
    if not torch.cuda.is_available():
        recorder.skip("GPU", "torch finds no CUDA device")
        return
    recorder.attempt("GPU", query_gpus)
    free, total = torch.cuda.mem_get_info()
    recorder.note("GPU memory free", free / 2**30, "GiB")
    recorder.note("GPU memory", total / 2**30, "GiB")
    recorder.note("compute capability", ".".join(map(str, torch.cuda.get_device_capability())))
    recorder.attempt("torch adds bf16 products to float32", adds_to_float32)
    recorder.attempt("attention over packed sequences", packed_attention)


if __name__ == "__main__":
    main()
