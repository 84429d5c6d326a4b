"""Checks the GPUs of this host, Transformer Engine and FP8. Separate functions read the facts and judge them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_oreal.config import Fp8Recipe
from megatron_oreal.doctor.findings import Finding, error, ok, warning
from megatron_oreal.doctor.versions import is_met, read_requirements
from megatron_oreal.kernels.fp8.transformer_engine import check_version

MAX_USED_SHARE = 0.2  # of a GPU's memory that other processes may use
FP8_CAPABILITY = (8, 9)
TRANSFORMER_ENGINE = "transformer-engine"
SMI_SECONDS = 10.0
GPU_FOLDER = Path("/proc/driver/nvidia/gpus")


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: tuple[int, int]
    free_bytes: int
    total_bytes: int
    problem: str = ""  # the error of a small matrix product on it


@dataclass(frozen=True, slots=True)
class GpuFacts:
    gpus: Sequence[Gpu]  # that torch sees
    num_local_ranks: int  # processes of the job on this host; 1 if unknown
    num_devices: int  # known to NVIDIA's driver on this host, whether torch sees them or not
    cuda: str | None  # torch's CUDA version; None for a build without CUDA
    driver: str = ""
    given: str = ""  # the GPUs that CUDA_VISIBLE_DEVICES or Slurm assigns to this process
    hides_gpus: bool = False  # CUDA_VISIBLE_DEVICES is set and empty
    num_memory_errors: int = 0  # uncorrected errors since the driver started


def read_gpus() -> GpuFacts:
    """Reads the facts about the GPUs. Takes about a second per GPU, because CUDA starts."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = len(list(GPU_FOLDER.iterdir())) if GPU_FOLDER.is_dir() else 0
    environment = os.environ
    smi = ask_smi("driver_version,ecc.errors.uncorrected.volatile.total") if devices or count else []
    return GpuFacts(
        gpus=[read_gpu(number) for number in range(count)],
        num_local_ranks=int(environment.get("LOCAL_WORLD_SIZE", "1")),
        num_devices=devices,
        cuda=torch.version.cuda,
        driver=smi[0][0] if smi else "",
        given=environment.get("CUDA_VISIBLE_DEVICES", environment.get("SLURM_STEP_GPUS", "")),
        hides_gpus=environment.get("CUDA_VISIBLE_DEVICES") == "",
        num_memory_errors=sum(int(row[1]) for row in smi if len(row) > 1 and row[1].isdecimal()),
    )


def read_gpu(number: int) -> Gpu:
    name, capability, free, total, problem = "unknown GPU", (0, 0), 0, 0, ""
    try:
        properties = torch.cuda.get_device_properties(number)
        name, capability = properties.name, (properties.major, properties.minor)
        free, total = torch.cuda.mem_get_info(number)
        square = torch.ones(256, 256, device=f"cuda:{number}", dtype=torch.bfloat16)
        problem = "" if (square @ square)[0, 0].item() == 256 else "a product of ones is wrong"
    except RuntimeError as raised:
        problem = str(raised).splitlines()[0]
    return Gpu(name, capability, free, total, problem)


def ask_smi(query: str) -> list[list[str]]:
    """Returns nvidia-smi's answer for each GPU; [] without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def check_gpus(facts: GpuFacts) -> Iterator[Finding]:
    if not facts.gpus:
        yield from check_without_gpus(facts)
        return
    names = {gpu.name for gpu in facts.gpus}
    sizes = f"{min(gpu.total_bytes for gpu in facts.gpus) / 2**30:.0f} GiB each"
    yield ok(
        "gpus", f"{len(facts.gpus)} x {', '.join(sorted(names))}, {sizes}, CUDA {facts.cuda}, driver {facts.driver}"
    )
    if len(names) > 1:
        yield warning("gpus", "GPUs of several kinds", "the slowest sets the pace: name equal ones")
    if facts.num_local_ranks > len(facts.gpus):
        yield error(
            "gpus",
            f"{facts.num_local_ranks} processes on a host with {len(facts.gpus)} visible GPUs",
            "ask for as many tasks as GPUs (--ntasks-per-node, --gpus-per-node), and set no --gpus-per-task",
        )
    for number, gpu in enumerate(facts.gpus):
        if gpu.problem:
            yield error("gpus", f"GPU {number} fails: {gpu.problem}", "drain the node, or leave the GPU out")
        elif gpu.total_bytes - gpu.free_bytes > MAX_USED_SHARE * gpu.total_bytes:
            used = f"{(gpu.total_bytes - gpu.free_bytes) / 2**30:.0f} of {gpu.total_bytes / 2**30:.0f} GiB"
            yield warning("gpus", f"GPU {number}: other processes use {used}", "end them, or ask for --exclusive")
    if facts.num_memory_errors:
        yield error(
            "gpus", f"{facts.num_memory_errors} uncorrected memory errors", "drain the node, and have its GPU reset"
        )


def check_without_gpus(facts: GpuFacts) -> Iterator[Finding]:
    """Accepts a machine without GPUs, but not one with GPUs that torch does not see."""
    is_given = facts.given not in ("", "-1", "NoDevFiles")
    if not (facts.num_devices or is_given):
        yield ok("gpus", "none: the run is on the CPU, with gloo")
        return
    if facts.hides_gpus:
        yield warning("gpus", "CUDA_VISIBLE_DEVICES is empty: the run is on the CPU", "unset it to use the GPUs")
        return
    what = f"{facts.num_devices} GPUs" if facts.num_devices else f"GPUs {facts.given}"
    if facts.cuda is None:
        fix = "install torch for CUDA into this environment (this build is for the CPU)"
    else:
        fix = f"the driver must suit CUDA {facts.cuda}, see nvidia-smi; in a container, start it with GPUs (--gpus all)"
    yield error("gpus", f"torch sees none of this host's {what}", fix)


def check_transformer_engine(facts: GpuFacts, wanted: bool = False) -> Iterator[Finding]:
    """Checks Transformer Engine. `wanted`: whether the configuration requires it."""
    if not facts.gpus and not wanted:
        yield ok("te", "Transformer Engine is for GPUs; there are none")
        return
    name = "te"
    needed = next(one for one in read_requirements("gpu") if one.name == TRANSFORMER_ENGINE)
    fix = "install it: pip install '.[gpu]', or take an NGC image (docker/README.md)"
    try:
        found = version(TRANSFORMER_ENGINE)
    except PackageNotFoundError:
        kind = error if wanted else warning
        yield kind(name, "Transformer Engine is not installed", fix if wanted else f"layers are slower without; {fix}")
        return
    try:
        check_version("a run")
    except ValueError as mistake:
        yield error(name, f"Transformer Engine {found} cannot be used", f"{mistake}; build it for this torch")
        return
    if not is_met(needed, found):
        yield warning(name, f"Transformer Engine {found} is not {needed.specifier}", "take one of these releases")
        return
    yield ok(name, f"Transformer Engine {found}")


def check_fp8(facts: GpuFacts, recipe: Fp8Recipe | None = None, head_precision: str = "bf16") -> Iterator[Finding]:
    """Compares the GPUs' FP8 support with the configuration; without a configuration, only reports it."""
    wanted = [f"model.fp8={recipe}"] if recipe else []
    wanted += ["model.head_precision=fp8_grad"] if head_precision == "fp8_grad" else []
    needed = (10, 0) if recipe == "mxfp8" else (9, 0) if recipe == "blockwise" else FP8_CAPABILITY
    lowest = min((gpu.capability for gpu in facts.gpus), default=None)
    if lowest is not None and lowest >= needed:
        yield ok("fp8", f"GPUs of compute capability {lowest[0]}.{lowest[1]} have FP8 products")
    elif wanted:
        has = f"GPUs of compute capability {lowest[0]}.{lowest[1]}" if lowest else "no GPU"
        yield error("fp8", f"{' and '.join(wanted)} with {has}", f"needs >= {needed[0]}.{needed[1]}; drop the setting")
    else:
        yield ok("fp8", "no FP8 products on this host; none are asked for")


def check_memory_need(state_bytes: int, facts: GpuFacts, names: str) -> Iterator[Finding]:
    """Compares the permanent GPU memory of the run with the smallest GPU."""
    total = min(gpu.total_bytes for gpu in facts.gpus)
    need = f"weights, gradients and optimizer take {state_bytes / 2**30:.1f} of a GPU's {total / 2**30:.0f} GiB"
    fix = f"raise {names}, or share the optimizer among more replicas (docs/memory.md)"
    if state_bytes > total:
        yield error("memory", need, fix)
    elif state_bytes > 0.85 * total:
        yield warning("memory", f"{need}, which leaves little for activations", fix)
    else:
        yield ok("memory", need)
