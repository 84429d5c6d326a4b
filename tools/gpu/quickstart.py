"""The quickstart on this device: a shorter warm-up and fewer steps, enough to see OREAL raise the greedy accuracy."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click
import torch

from megatron_oreal.observability.metrics import read_metrics
from tools.gpu.findings import Recorder, prepare_quickstart, timed

WARM_UP_STEPS, STEPS = 800, 40
MIN_RISE = 0.2  # of the greedy accuracy on held-out problems
MAX_MISMATCH = 0.02  # mean nats between the engine's log-probs and the trainer's; bfloat16 takes most of it
COMMAND = [sys.executable, "-W", "ignore", "-m", "megatron_oreal.cli"]


def common(folder: Path, run: str, max_prompts: int) -> list[str]:
    return [
        f"run_dir={folder / run}",
        f"eval.prompts.heldout={folder / 'data' / 'heldout.jsonl'}",
        "eval.num_samples=0",
        "eval.every=100000",
        f"eval.max_prompts={max_prompts}",
        "checkpoint.every=100000",
    ]


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", default="quickstart")
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Gets the metrics of the OREAL run.")
@click.option("--tiny", is_flag=True, help="A few steps, from which nothing can be learned.")
@click.argument("settings", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def main(findings: Path, step: str, work: Path, out: Path, tiny: bool, settings: tuple[str, ...]) -> None:
    """Prepares, warms up, trains with OREAL, and compares the accuracy before and after. SETTINGS: of the OREAL run."""
    recorder = Recorder(findings, step)
    folder = work / "quickstart"
    for run in ("sft", "oreal"):
        shutil.rmtree(folder / run, ignore_errors=True)
    warm_up_steps, steps, max_prompts = (20, 2, 16) if tiny else (WARM_UP_STEPS, STEPS, 512)
    prepare_quickstart(folder / "data", 500 if tiny else 40000)
    data, sft, oreal = folder / "data", folder / "sft", folder / "oreal"
    warm_up = [*COMMAND, "sft", "examples/quickstart/sft.yaml", *common(folder, "sft", max_prompts)]
    warm_up += [f"model.path={data / 'model'}", f"data.examples={data / 'sft.jsonl'}", f"num_steps={warm_up_steps}"]
    recorder.note(f"warm-up of {warm_up_steps} steps", timed([*warm_up, "parallel.data=1"]), "s")
    train = [*COMMAND, "train", "examples/quickstart/config.yaml", *common(folder, "oreal", max_prompts)]
    train += [f"model.path={sft / 'hf'}", f"data.prompts={data / 'train.jsonl'}", f"num_steps={steps}"]
    recorder.note(f"OREAL of {steps} steps", timed([*train, "parallel.tensor=1", *settings]), "s")
    shutil.copyfile(oreal / "metrics.jsonl", out)
    record_learning(recorder, oreal, judged=not tiny)


def record_learning(recorder: Recorder, run_dir: Path, judged: bool) -> None:
    rows = read_metrics(run_dir)
    evaluations = [row["eval/heldout/greedy"] for row in rows if "eval/heldout/greedy" in row]
    before, after = evaluations[0], evaluations[-1]
    rewards = [row["reward/mean"] for row in rows if "reward/mean" in row]
    recorder.note("reward, first and last step", f"{rewards[0]:.3f} -> {rewards[-1]:.3f}")
    text = f"{before:.3f} -> {after:.3f}"
    if judged:
        recorder.check("greedy accuracy", text, after >= before + MIN_RISE, f"a rise of {MIN_RISE}")
    else:
        recorder.note("greedy accuracy", text)
    mismatch = max(row["policy/mismatch"] for row in rows if "policy/mismatch" in row)
    recorder.check("engine mismatch, mean nats", mismatch, mismatch <= MAX_MISMATCH, f"<= {MAX_MISMATCH:g}")
    largest = max(row["policy/mismatch_max"] for row in rows if "policy/mismatch_max" in row)
    recorder.note("engine mismatch of one token", largest, "nats")
    seconds = sorted(row["time/step_seconds"] for row in rows[1:-1] or rows)
    recorder.note("median OREAL step", seconds[len(seconds) // 2], "s")
    if torch.cuda.is_available():
        recorder.note("device", torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
