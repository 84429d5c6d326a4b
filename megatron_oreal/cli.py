"""Implements the command line, megatron-oreal. It reports a user's mistake in one line on stderr, with exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from megatron_oreal.commands.tools import TOOLS
from megatron_oreal.config import (
    EvalRunConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
    check_layout,
    check_lengths,
    check_packages,
    load_config,
    num_processes,
)
from megatron_oreal.launch import (
    adopt_slurm_task,
    end_with_launcher,
    interrupted,
    is_lost_connection,
    launch,
    on_interrupt,
    one_line_errors,
    set_threads,
    use_expandable_segments,
)
from megatron_oreal.observability.printable import printable
from megatron_oreal.parallel.stopping import REQUEUE, RunStopped, block_stop_signal
from megatron_oreal.weights.families import trainable_families

SETTINGS = (
    "--dry-run prints every setting with its value; docs/settings.md in the repository says what each means. An "
    "example is examples/quickstart/config.yaml."
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="megatron_oreal")
def cli() -> None:
    """Outcome-reward reinforcement learning for mathematical reasoning."""


@cli.command(epilog=SETTINGS)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check settings, layout and data, print them, and stop.")
def train(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Trains with outcome rewards. Run the same command again to resume."""

    def run(resolved: TrainConfig) -> None:
        from megatron_oreal.train import train

        train(resolved)

    start(TrainConfig, config, overrides, dry_run, run)


@cli.command(epilog=SETTINGS)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check settings, layout and data, print them, and stop.")
def sft(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Trains on examples (supervised warm-up). Run the same command again to resume."""

    def run(resolved: SftConfig) -> None:
        from megatron_oreal.train import sft

        sft(resolved)

    start(SftConfig, config, overrides, dry_run, run)


@cli.command("eval", epilog=SETTINGS)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check settings, layout and data, print them, and stop.")
@click.option("--run", "trained", type=click.Path(path_type=Path), help="Measure the model of this training run_dir.")
@click.option("--checkpoint", help="With --run: best (default), last, or a step number.")
def evaluate(
    config: Path, overrides: tuple[str, ...], dry_run: bool, trained: Path | None, checkpoint: str | None
) -> None:
    """Measures a model on datasets. Run the same command again to continue after the last finished dataset.

    With --run RUN_DIR, the model is a checkpoint of that run; the command writes its policy to
    RUN_DIR/exports/step_NUMBER.
    """
    if trained is None and checkpoint is not None:
        raise ValueError("--checkpoint chooses a checkpoint of --run: give that too, or drop it")
    if trained is not None:
        overrides = (*overrides, f"model.path={json.dumps(str(exported_model(trained, checkpoint or 'best')))}")

    def run(resolved: EvalRunConfig) -> None:
        from megatron_oreal.evaluation.benchmark import evaluate_datasets

        table = evaluate_datasets(resolved)
        if table is not None:
            click.echo(table)

    start(EvalRunConfig, config, overrides, dry_run, run)


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check settings, layout and data, print them, and stop.")
def passrate(config: Path, overrides: tuple[str, ...], dry_run: bool) -> None:
    """Measures how often a model solves each prompt. Run the same command again to continue.

    CONFIG is a configuration of `eval`. The model gives eval.num_samples responses to each prompt of eval.prompts.NAME.
    The command writes RUN_DIR/prompts/NAME.jsonl: the prompts file with "pass_rate", which data.repeats_by_pass_rate
    of `train` uses.
    """

    def run(resolved: EvalRunConfig) -> None:
        from megatron_oreal.evaluation.pass_rates import measure_pass_rates

        table = measure_pass_rates(resolved)
        if table is not None:
            click.echo(table)

    start(EvalRunConfig, config, overrides, dry_run, run)


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
def serve(config: Path, overrides: tuple[str, ...]) -> None:
    """Starts only the SGLang servers of a training run, and runs until Ctrl-C.

    If the trainer is on another node, set rollout.sglang.host to an address of this node that the trainer can reach.
    The command writes the servers' addresses and keys to rollout.sglang.endpoints_file, or else to
    RUN_DIR/servers.json. The trainer reads them with rollout.sglang.endpoints_file=FILE, from a folder that both
    nodes can read.
    """
    resolved = load_config(TrainConfig, config, overrides)
    check_lengths(resolved, check_layout(resolved, trainable_families()))
    import torch

    from megatron_oreal.engines.sglang.servers.fleet import serve_until_stopped
    from megatron_oreal.run.engines import server_settings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    serve_until_stopped(server_settings(resolved, device), lambda line: click.echo(printable(line)))


@cli.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option("--confidence", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.95)
def compare(run_a: Path, run_b: Path, confidence: float) -> None:
    """Compares two evaluations question by question: exact McNemar test (greedy), paired bootstrap (mean@n)."""
    from megatron_oreal.evaluation.comparison import compare_runs, format_comparison

    click.echo(format_comparison(compare_runs(run_a, run_b, confidence), confidence))


@cli.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--group-size", type=int, required=True, help="Number of samples per prompt.")
@click.option("--h", help='For expression: h(t) of the pass rate t, e.g. "log(t / (1 - t))".')
@click.option("--smoothing", type=float, help="For expression: a constant that keeps h finite at 0 and 1.")
@click.option("--n", type=int, help="For pass_at_n: the number n (default 2).")
@click.option("--std", help="For grpo: the standard deviation, population, bessel or none.")
@click.option("--epsilon", type=float, help="For grpo: the number added to the standard deviation.")
@click.option("--baseline", help="For pass_at_n, logit and expression: leave_one_out or none.")
@click.option("--negative-coef", type=float, help="For the variants of OREAL: the coefficient eta.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a plot to this PNG file.")
def objective(names: tuple[str, ...], group_size: int, out: Path | None, **options: Any) -> None:
    """Prints what an algorithm optimises: its weights, and the function h of the pass rate that they induce.

    NAME is reinforce, rloo, rejection_sampling, grpo, pass_at_n, logit, expression, oreal_reference,
    oreal_reference_all or oreal_paper. It can also be one law: best_of_n (of --group-size samples), optimum (under
    a KL penalty) or arcsine (the limit of GRPO).
    """
    from megatron_oreal.reports.objective import describe_objective, plot_objectives, read_objectives
    from megatron_oreal.reports.theory import plot_law, read_law

    given = {name: value for name, value in options.items() if value is not None}
    law = read_law(names, group_size, given)
    if law is not None:
        if out is not None:
            plot_law(law, group_size, out)
            click.echo(f"the plot is {out}", err=True)
        click.echo(law.describe(group_size))
        return
    objectives = read_objectives(names, group_size, given)
    if out is not None:
        plot_objectives(objectives, out)
        click.echo(f"the plot is {out}; dashed: what large groups approach", err=True)
    click.echo("\n\n".join(map(describe_objective, objectives)))
    for found in objectives:
        for warning in found.warnings:
            click.echo(f"Warning: {warning}", err=True)


@cli.command()
@click.argument("runs", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="RUN...")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Write the HTML page to this file.")
def report(runs: tuple[Path, ...], out: Path) -> None:
    """Writes one page about finished or unfinished runs of train or sft: curves, pass rates, times, differences."""
    from megatron_oreal.reports.run_report.command import write_report

    click.echo("\n".join(write_report(runs, out)))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write an HTML page to this file; print no table.")
@click.option("--steps", metavar="A:B", default="", help="Show only these steps: N, A:B, A: or :B.")
@click.option("--source", "sources", multiple=True, help="Show only this data set; may be given several times.")
@click.option("--status", "statuses", multiple=True, help="Show only this status; may be given several times.")
@click.option("--reward", metavar="A:B", default="", help="Show only these rewards, written as for --steps.")
@click.option("--tokens", metavar="A:B", default="", help="Show only responses with this many tokens, as for --steps.")
@click.option("--disagree", is_flag=True, help="Show only samples on which judge and rules disagree.")
@click.option("--search", default="", help="Show only samples with this text in prompt, answer or response.")
@click.option("--sort", default=None, help="Order of the table: worst (default), run, newest, longest, shortest, ...")
@click.option("--full", is_flag=True, help="Print whole responses instead of a table.")
@click.option("--limit", type=click.IntRange(min=1), help="Most samples to show: 20 by default, on a page 20000.")
def view(
    run: Path, out: Path | None, sort: str | None, full: bool, limit: int | None, disagree: bool, **chosen: Any
) -> None:
    """Shows the samples of a finished or unfinished training run: as a table, or with --out as a page for a browser."""
    from megatron_oreal.reports.viewer.command import read_filters, view_as_page, view_as_table

    filters = read_filters(disagreements=disagree, **chosen)
    if out is not None:
        if full or sort is not None:
            raise ValueError("--sort and --full are for the terminal: drop them, the page has its own controls")
        click.echo("\n".join(view_as_page(run, filters, limit, out)))
        return
    text, notes = view_as_table(run, filters, limit, sort or "worst", full, shutil.get_terminal_size((140, 24)).columns)
    encoding = sys.stdout.encoding or "utf-8"
    try:
        click.echo(text.encode(encoding, "backslashreplace").decode(encoding))
    except BrokenPipeError:  # A reader such as `head` has closed the pipe; the flush at the exit must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for note in notes:
        click.echo(note, err=True)


def exported_model(run_dir: Path, checkpoint: str) -> Path:
    """Returns the Hugging Face directory of a run's checkpoint; the first process of the evaluation writes it."""
    from megatron_oreal.conversion.run_checkpoints import exported_policy, find_checkpoint

    if "RANK" in os.environ:
        found = find_checkpoint(run_dir, checkpoint)
        if not (found.export / "config.json").is_file():
            raise ValueError(
                f"--run: {found.export} is not there yet; write it before torchrun or srun: `megatron-oreal export "
                f"{run_dir} {checkpoint}`"
            )
        return found.export
    path, found = exported_policy(run_dir, checkpoint)
    click.echo(f"{path}: the policy of step {found.step} ({found.words})", err=True)
    return path


def start(kind: Any, path: Path, overrides: Sequence[str], dry_run: bool, run: Callable[[Any], None]) -> None:
    """Makes all checks that need no torch, then runs in this process or in new ones."""
    adopt_slurm_task()
    config = load_config(kind, path, overrides)
    if isinstance(config, RunConfig) and os.environ.get("RANK", "0") == "0":
        check_packages(config.trackers, config.prometheus)
    if dry_run:
        from megatron_oreal.run.dry_run import describe_run

        for part in describe_run(config):
            click.echo(part)
        return
    check_lengths(config, check_layout(config, trainable_families()))
    if num_processes(config.parallel) > 1 and "RANK" not in os.environ:
        launch(config)
    else:
        set_threads(1 if "RANK" not in os.environ else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if config.rollout.engine == "local" or config.rollout.sglang.weight_transport != "tensor":
            use_expandable_segments()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            end_with_launcher()
        is_first = os.environ.get("RANK", "0") == "0"
        try:
            run(config)
        except RunStopped:  # Only one process reports it: a launcher ends the others at the first code other than 0.
            sys.exit(REQUEUE if is_first else 0)


for tool in TOOLS:
    cli.add_command(tool.command())


def main() -> None:
    signal.signal(signal.SIGINT, on_interrupt)
    block_stop_signal()
    try:
        with one_line_errors():
            cli(standalone_mode=False)
    except click.Abort:
        interrupted(signal.SIGINT)
    except RuntimeError as error:
        if is_lost_connection(error):
            time.sleep(60)  # a failing process breaks the others' connections: let it report its error first
        raise


if __name__ == "__main__":
    main()
