"""Every algorithm, or every KL term, on the quickstart's task, several seeds each: one table and one plot.

    .venv/bin/python examples/ablation/ablation.py
    .venv/bin/python examples/ablation/ablation.py --table kl --out runs/ablation_kl

All start from the same warmed-up model of their seed and share learning rate, schedule and number of samples; none was
tuned for itself. A finished run is not repeated, an interrupted one continues.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.metrics import Metrics, read_metrics
from megatron_oreal.reports.curves import Band, format_table, plot_bands

CONFIG = Path("examples/quickstart/config.yaml")
PASS_AT_1, GREEDY = "eval/heldout/pass@1", "eval/heldout/greedy"
# Student's t for a two-sided 95 % interval of the mean, by number of seeds.
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}
NO_REWARD_MODEL = ["algorithm.reward_model.enabled=false", "algorithm.policy_freeze_steps=0"]
ALGORITHMS: dict[str, list[str]] = {
    "OREAL paper": [],
    "OREAL paper, no reward model": NO_REWARD_MODEL,
    "OREAL reference": ["algorithm.preset=reference"],
    "OREAL reference, no reward model": ["algorithm.preset=reference", *NO_REWARD_MODEL],
    "PPO": ["algorithm={name: ppo, critic_minibatches: 4, critic: {optimizer: {lr: 1.0e-3, beta2: 0.95}}}"],
    "REINFORCE": ["algorithm={name: outcome, objective: reinforce}"],
    "RLOO": ["algorithm={name: outcome, objective: rloo}"],
    "rejection sampling": ["algorithm={name: outcome, objective: rejection_sampling}"],
    "GRPO": ["algorithm={name: outcome, objective: grpo}"],
    "logit": ["algorithm={name: outcome, objective: logit}"],
    "pass@2": ["algorithm={name: outcome, objective: pass_at_n, n: 2}"],
    "pure rejection sampling": ["algorithm={name: outcome, objective: pure_rejection_sampling}"],
    "log(t + 0.1)": ["algorithm={name: outcome, objective: expression, h: log(t + 0.1)}"],
}
COEFFICIENTS = ("0.001", "0.01", "0.1")
# The old policy is the same as the policy in the first update after a rollout, so `old` needs a second one to act.
TWO_UPDATES = ["policy.updates_per_step=2"]
KL_TERMS: dict[str, list[str]] = {
    "no KL": ["algorithm.kl_coef=0"],
    **{f"initial, {value}": [f"algorithm.kl_coef={value}"] for value in COEFFICIENTS},
    "no KL, 2 updates": ["algorithm.kl_coef=0", *TWO_UPDATES],
    **{
        f"old, {value}, 2 updates": [f"algorithm.kl_coef={value}", "algorithm.kl_target=old", *TWO_UPDATES]
        for value in COEFFICIENTS
    },
}
TABLES = {"algorithms": ALGORITHMS, "kl": {name: [*NO_REWARD_MODEL, *rows] for name, rows in KL_TERMS.items()}}


@dataclass(slots=True)
class Result:
    """The evaluations of one algorithm, one list of records a seed."""

    name: str
    evaluations: list[list[Metrics]]
    step_seconds: float  # median

    def final(self, metric: str) -> list[float]:
        return [records[-1][metric] for records in self.evaluations]


@click.command()
@click.option("--seeds", default=3, show_default=True, type=int, help="2 to 8: an interval needs two.")
@click.option("--table", default="algorithms", show_default=True, type=click.Choice(list(TABLES)))
@click.option("--only", multiple=True, help="These rows of the table; repeatable.")
@click.option("--steps", default=100, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default="runs/ablation", show_default=True, type=click.Path(file_okay=False, path_type=Path))
def main(seeds: int, table: str, only: tuple[str, ...], steps: int, out: Path) -> None:
    """Compares algorithms, or KL terms of OREAL without its reward model; writes ablation.md and ablation.png."""
    rows = TABLES[table]
    if unknown := [name for name in only if name not in rows]:
        raise click.BadParameter(f"{unknown[0]!r} is no row of {table}; it has {', '.join(rows)}", param_hint="--only")
    if seeds not in T_95:
        raise click.BadParameter(
            f"an interval over seeds needs 2 to {max(T_95)} of them, got {seeds}", param_hint="--seeds"
        )
    cold = [seed for seed in range(seeds) if not (quickstart(seed) / "sft" / "hf").is_dir()]
    names = only or tuple(rows)
    click.echo(
        f"{len(cold)} warm-ups, then {len(names) * seeds} runs of {steps} steps: {len(names)} rows, {seeds} seeds"
    )
    for seed in cold:
        run([sys.executable, "examples/quickstart/quickstart.py", "--seed", str(seed), "--warm-up-only"])
    results, begin, num_done = [], time.monotonic(), 0
    for name in names:
        for seed in range(seeds):
            train(name, rows[name], seed, steps, run_dir(out, name, seed))
            num_done += 1
            minutes_left = (time.monotonic() - begin) / num_done * (len(names) * seeds - num_done) / 60
            click.echo(f"{num_done} of {len(names) * seeds} runs, about {minutes_left:.0f} minutes left")
        results.append(collect(name, [run_dir(out, name, seed) for seed in range(seeds)]))
    report(results, out)


def quickstart(seed: int) -> Path:
    return Path("runs") / ("quickstart" if seed == 0 else f"quickstart-{seed}")


def run_dir(out: Path, name: str, seed: int) -> Path:
    return out / f"{re.sub(r'[^a-z0-9@]+', '_', name.lower()).strip('_')}-{seed}"


def train(name: str, settings: list[str], seed: int, steps: int, folder: Path) -> None:
    base = quickstart(seed)
    overrides = [f"run_dir={folder}", f"seed={seed}", f"num_steps={steps}", f"model.path={base}/sft/hf"]
    overrides += [f"data.prompts={base}/data/train.jsonl", f"eval.prompts.heldout={base}/data/heldout.jsonl"]
    overrides += ["checkpoint.every=1000", "checkpoint.export_hf=false", *settings]
    click.secho(f"{name}, seed {seed}", bold=True)
    run([sys.executable, "-m", "megatron_oreal.cli", "train", str(CONFIG), *overrides])


def run(command: list[str]) -> None:
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def collect(name: str, folders: list[Path]) -> Result:
    runs = [read_metrics(folder) for folder in folders]
    seconds = sorted(r["time/step_seconds"] for records in runs for r in records if "reward/mean" in r)
    return Result(name, [[r for r in records if GREEDY in r] for records in runs], seconds[len(seconds) // 2])


def report(results: list[Result], out: Path) -> None:
    rows = []
    for result in results:
        before = [records[0][PASS_AT_1] for records in result.evaluations]
        cells = [interval(before), interval(result.final(PASS_AT_1)), interval(result.final(GREEDY))]
        rows.append([result.name, *cells, f"{result.step_seconds:.2f}"])
    header = ["algorithm", "sampled before", "sampled pass@1", "greedy pass@1", "s a step"]
    table = format_table(rows, header)
    click.echo(f"\nmean and 95 % interval over {len(results[0].evaluations)} seeds\n{table}")
    write_atomically(out / "ablation.md", f"```\n{table}\n```\n")
    bands = [Band(result.name, *mean_curve(result)) for result in results]
    plot_bands(bands, "sampled pass@1 on held-out problems, mean and 95 % interval", out / "ablation.png")
    click.echo(f"\n{out / 'ablation.md'}\n{out / 'ablation.png'}")


def interval(values: list[float]) -> str:
    mean, half = mean_and_half_width(values)
    return f"{mean:.3f} ± {half:.3f}"


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    count = len(values)
    mean = sum(values) / count
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, T_95[count] * deviation / math.sqrt(count)


def mean_curve(result: Result) -> tuple[list[float], list[float], list[float]]:
    steps = [record["step"] for record in result.evaluations[0]]
    points = [
        mean_and_half_width([records[index][PASS_AT_1] for records in result.evaluations])
        for index in range(len(steps))
    ]
    return steps, [mean for mean, _ in points], [half for _, half in points]


if __name__ == "__main__":
    main()
