"""Computes the seconds of each phase of a step, and the model FLOPs utilization (MFU) of the update.

    MFU = 6 x active parameters x trained tokens / (seconds of the policy's training x processes x peak FLOPs a second)

The MFU counts the policy's products with weights, forward and backward, but not the products within attention, so the
value is a lower bound. It does not count padding, recomputation or the other models.
"""

from __future__ import annotations

import re

from megatron_oreal.reports.run_report.charts import Curve
from megatron_oreal.reports.run_report.runs import ReportedRun

MFU_FORMULA = (
    "MFU = 6 x active parameters x trained tokens / (seconds of the policy's training x processes x peak of a GPU). "
    "Products within attention, recomputation and the other models are not counted: it is a lower bound."
)
NO_PEAK = "The peak is the dense BF16 peak in the GPU's data sheet."
# Dense BF16 FLOPs a second from the makers' data sheets, by a part of the GPU's name; the first match counts.
PEAK_FLOPS = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("H800", 989e12),
    ("H20", 148e12), ("B200", 2250e12), ("B300", 2250e12), ("A100", 312e12), ("A800", 312e12), ("L40S", 362e12),
    ("A40", 150e12), ("A10", 125e12),
)  # fmt: skip
PHASE = re.compile(r"time/([a-z_]+)_seconds")


def phase_seconds(run: ReportedRun) -> dict[str, Curve]:
    """Returns the seconds of the disjoint phases of each step, by the phase's name."""
    phases = {match[1] for name in run.metric_names if (match := PHASE.fullmatch(name))} - {"step"}
    return {phase.replace("_", " "): run.curve(f"time/{phase}_seconds") for phase in phases}


def flops_per_process(run: ReportedRun) -> Curve:
    """Returns each process's FLOPs a second while the policy trains; empty if the run did not record its size."""
    start = run.starts[-1] if run.starts else {}
    parameters, processes = start.get("active_parameters"), start.get("num_processes")
    if not isinstance(parameters, int | float) or not isinstance(processes, int) or processes < 1:
        return {}
    tokens, seconds = run.curve("train/num_tokens"), run.curve("time/in_update/policy_train")
    return {
        step: 6 * parameters * tokens[step] / (seconds[step] * processes)
        for step in tokens.keys() & seconds.keys()
        if seconds[step] > 0 and tokens[step] > 0
    }


def peak_flops(run: ReportedRun) -> float | None:
    gpu = str(run.starts[-1].get("gpu", "")) if run.starts else ""
    return next((peak for name, peak in PEAK_FLOPS if name in gpu), None)


def utilization(run: ReportedRun) -> dict[str, Curve]:
    peak = peak_flops(run)
    if peak is None:
        return {}
    return {"MFU": {step: flops / peak for step, flops in sorted(flops_per_process(run).items())}}


def update_flops(run: ReportedRun) -> dict[str, Curve]:
    return {"TFLOP/s": {step: flops / 1e12 for step, flops in sorted(flops_per_process(run).items())}}
