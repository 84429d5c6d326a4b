"""The quickstart: makes a task and a tiny model, warms it up, trains it with OREAL, and shows what it has learned.

It runs the package's own commands and prints them; the same command again resumes, or shows the results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from megatron_oreal.observability.metrics import Metrics, read_metrics
from megatron_oreal.reports.curves import format_table, plot_curves

HERE = Path(os.path.relpath(Path(__file__).parent))
CURVES = (
    ("accuracy on held-out problems", ("eval/heldout/greedy", "eval/heldout/pass@1")),
    ("reward of the samples", ("reward/mean",)),
    ("groups with correct and incorrect samples", ("reward/groups_mixed",)),
    ("token weights", ("policy/weight_positive", "policy/weight_negative")),
)
TABLE = (
    ("greedy pass@1", "eval/heldout/greedy"),
    ("sampled pass@1", "eval/heldout/pass@1"),
    ("answer length, tokens", "eval/heldout/length"),
)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the data, the model and the runs.")
@click.option("--engine", type=click.Choice(["local", "sglang"]), default="local", help="What generates the samples.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Default: runs/quickstart, -SEED added.")
@click.option("--warm-up-only", is_flag=True, help="Stop before OREAL, with the model that it starts from.")
def main(seed: int, engine: str, out: Path | None, warm_up_only: bool) -> None:
    """Trains a tiny model to do arithmetic, on a CPU or a GPU, in a few minutes."""
    start = time.monotonic()
    out = out or Path("runs") / ("quickstart" if seed == 0 else f"quickstart-{seed}")
    data, sft, oreal = out / "data", out / "sft", out / ("oreal" if engine == "local" else f"oreal-{engine}")
    if not (data / "model").is_dir():
        run("1/3 task and tiny model", str(HERE / "prepare.py"), "--out", str(data), "--seed", str(seed))
    run(
        "2/3 supervised warm-up on partly wrong examples",
        *[*MEGATRON_OREAL, "sft", str(HERE / "sft.yaml"), f"run_dir={sft}", f"seed={seed}"],
        *[f"model.path={data}/model", f"data.examples={data}/sft.jsonl", f"eval.prompts.heldout={data}/heldout.jsonl"],
        *layout("data"),
    )
    if warm_up_only:
        return
    run(
        "3/3 OREAL on outcome rewards",
        *[*MEGATRON_OREAL, "train", str(HERE / "config.yaml"), f"run_dir={oreal}", f"seed={seed}"],
        *[f"model.path={sft}/hf", f"data.prompts={data}/train.jsonl", f"eval.prompts.heldout={data}/heldout.jsonl"],
        *([] if engine == "local" else [f"rollout.engine={engine}"]),
        *layout("tensor"),
    )
    show(oreal, time.monotonic() - start)


MEGATRON_OREAL = ["-m", "megatron_oreal.cli"]


def run(title: str, *arguments: str) -> None:
    click.secho(f"\n{title}\n  python {' '.join(arguments)}", bold=True)
    done = subprocess.run([sys.executable, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def layout(parallelism: str) -> list[str]:
    """Two processes, but on a machine with a single GPU one."""
    import torch

    if torch.cuda.is_available() and torch.cuda.device_count() < 2:
        return [f"parallel.{parallelism}=1"]
    return []


def show(run_dir: Path, seconds: float) -> None:
    metrics = read_metrics(run_dir)
    evaluated = [record for record in metrics if "eval/heldout/greedy" in record]
    before, after = evaluated[0], evaluated[-1]
    rows = [[name, before.get(metric), after.get(metric)] for name, metric in TABLE]
    click.echo("\n" + format_table(rows, ["on 512 held-out problems", "before", "after"]))
    click.echo("\nThe same problems, answered greedily before and after:")
    for old, new in zip(answers(run_dir, before), answers(run_dir, after), strict=True):
        click.echo(f"  {old['prompt']}")
        for label, row in (("before", old), ("after ", new)):
            click.echo(f"    {label}  {row['response']}  {row['status']}")
    plot = run_dir / "curves.png"
    plot_curves(metrics, CURVES, plot)
    step_seconds = sorted(record["time/step_seconds"] for record in metrics if "time/rollout_seconds" in record)
    click.echo(f"\ncurves       {plot}\nTensorBoard  {tensorboard()} --logdir {run_dir / 'tensorboard'}")
    click.echo(f"model        {run_dir / 'hf'} (Hugging Face format)")
    click.echo(f"{seconds:.0f} s in all; a step took {step_seconds[len(step_seconds) // 2]:.2f} s (median)")


def answers(run_dir: Path, record: Metrics) -> list[dict[str, Any]]:
    file = run_dir / "evaluations" / f"step_{int(record['step']):06d}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def tensorboard() -> str:
    return os.path.relpath(Path(sys.executable).with_name("tensorboard"))


if __name__ == "__main__":
    main()
