"""`megatron-oreal export` writes a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import click

from megatron_oreal.commands.convert import num_workers
from megatron_oreal.conversion.conversion import ConversionOptions, prepare_output
from megatron_oreal.conversion.run_checkpoints import export_policy, exported_policy, find_checkpoint


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("checkpoint", default="best")
@click.option("--metric", default="", help="What decides which is best; default: the run's checkpoint.best_metric.")
@click.option("--out", type=click.Path(path_type=Path), help="Must not exist; default: RUN/exports/step_NUMBER.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: one a core, at most 8.")
def main(run: Path, checkpoint: str, metric: str, out: Path | None, workers: int | None) -> None:
    """Writes the policy of a checkpoint of RUN as a Hugging Face directory.

    RUN is the run_dir of train or sft, finished or not. CHECKPOINT is best (default), last, or the number of a step.
    """
    if out is None:
        out, found = exported_policy(run, checkpoint, metric, num_workers(workers))
    else:
        prepare_output(out)
        found = find_checkpoint(run, checkpoint, metric)
        export_policy(found, out, ConversionOptions(num_workers=num_workers(workers)))
    click.echo(f"{out}: the policy of step {found.step} ({found.words})")
