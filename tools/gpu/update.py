"""OREAL updates of a random model: tokens a second, share of the GPU's peak, memory.

MFU = (3 x forward of the policy + 3 x forward of the reward model + forward of the reference) / seconds / peak, where
a forward pass counts 2 operations a parameter of the layers and token, the causal half of attention, and the
vocabulary's product at response tokens for policy and reference; recomputed activations count nothing. Peak is 989
TFLOP/s, the dense bf16 rate of an H100 SXM or H200 by their data sheets.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from tools.gpu.findings import Recorder
from tools.gpu.model_run import ModelRun, opened, peak_gib, reset_peak_memory
from tools.gpu.random_model import SHAPES

PEAK_FLOPS = 989e12
WANTED_MFU = {"1.5b": {False: 0.40, True: 0.45}}  # without and with Transformer Engine


def measure(model: ModelRun, recorder: Recorder, steps: int, size: str, label: str) -> None:
    """The fastest update counts; the first one compiles and tunes kernels. `label` begins the names of all findings."""
    policy = model.run.models["policy"]
    recorder.note(f"{label}layers", "Transformer Engine" if policy.transformer_engine else "torch")
    best = float("inf")
    for step in range(steps):
        reset_peak_memory()
        metrics, seconds = model.update(step)
        tokens = metrics["train/num_tokens"]
        phases = [
            f"{name.removeprefix('time/in_update/')} {value:.3g}"
            for each in model.run.models.values()
            for name, value in each.flush_seconds().items()
        ]
        text = f"{seconds:.3g} s, {tokens / seconds:,.0f} response tokens/s; seconds: {', '.join(phases)}"
        recorder.note(f"{label}update {step}", text)
        if step:
            best = min(best, seconds)
    if steps < 2:
        return
    recorder.note(f"{label}response tokens/s", 2 * sum(each.response for each in model.lengths) / best)
    recorder.note(f"{label}all tokens/s", sum(model.sequence_lengths) / best)
    if not torch.cuda.is_available():
        return
    mfu = model.update_flops() / best / PEAK_FLOPS
    if size in WANTED_MFU:
        wanted = WANTED_MFU[size][policy.transformer_engine]
        recorder.check(f"{label}MFU", mfu, mfu >= wanted, f">= {wanted}")
    else:
        recorder.note(f"{label}MFU", mfu)
    recorder.note(f"{label}peak memory", peak_gib(), "GiB")


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="update")
@click.option("--size", type=click.Choice(list(SHAPES)), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=3)
@click.option("--prompts", "num_prompts", default=64, help="Of which two responses each are trained on.")
@click.argument("settings", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def main(
    findings: Path, step: str, size: str, work: Path, steps: int, num_prompts: int, settings: tuple[str, ...]
) -> None:
    """Measures STEPS updates on synthetic groups of realistic lengths."""
    with opened(size, work, num_prompts, settings) as model:
        measure(model, Recorder(findings, step), steps, size, f"{' '.join(settings)}: " if settings else "")


if __name__ == "__main__":
    main()
