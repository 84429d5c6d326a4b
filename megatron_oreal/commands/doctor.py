"""`megatron-oreal doctor`: checks a machine, or all ranks of a job, before a run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megatron_oreal.doctor.configuration import COMMANDS, load_any
from megatron_oreal.doctor.examination import examine
from megatron_oreal.doctor.findings import Report
from megatron_oreal.launch import adopt_slurm_task


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
@click.option("--command", type=click.Choice(COMMANDS), help="Whose CONFIG it is; default: the first that takes it.")
@click.option("--folder", type=click.Path(path_type=Path), help="The file system to try; default: run_dir, or here.")
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=45.0, show_default=True, help="After these the doctor gives up."
)
def main(
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
    command: str | None,
    folder: Path | None,
    seconds: float,
) -> None:
    """Checks versions, GPUs, network, SGLang, files and memory, and with CONFIG what that run needs.

    Alone it takes seconds on one process; under torchrun or srun the job's ranks try an all-reduce too. Each line is
    ok, a warning or an error, with the fix. The exit code is 1 when there is an error, and 2 for a mistake in the
    arguments.
    """
    adopt_slurm_task()
    resolved = None if config is None else load_any(config, overrides, command or "")
    where = folder or (Path() if resolved is None else resolved.run_dir)

    def show(report: Report) -> None:
        click.echo(report.json() if as_json else report.text())
        sys.stdout.flush()

    sys.exit(examine(resolved, where.absolute(), seconds, show))
