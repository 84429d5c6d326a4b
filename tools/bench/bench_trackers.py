"""Measures the cost of all trackers per step: one run whose steps log alternately with and without them.

    python tools/bench/bench_trackers.py [--steps 60] [--metrics 120] [--work-seconds 1.0]

A step multiplies matrices for --work-seconds on all cores, as a step of the quickstart does, and then logs a record of
--metrics numbers, either to metrics.jsonl and TensorBoard alone or to MLflow (a folder) and W&B (offline) too. A
step has a fixed number of products, so that a tracker that uses the processor makes the step longer. The order within
pairs alternates; the ratio is that of the mean step times, with a bootstrap interval over pairs.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from megatron_oreal.config import MlflowConfig, WandbConfig
from megatron_oreal.observability.metrics import MetricsLog
from megatron_oreal.observability.mlflow_client import MlflowTracker
from megatron_oreal.observability.trackers import Tracker
from megatron_oreal.observability.wandb_client import WandbTracker


def work(num_products: int) -> None:
    matrix = torch.ones(512, 512)
    for _ in range(num_products):
        matrix = (matrix @ matrix).clamp(max=1.0)


def products_in(seconds: float) -> int:
    """Returns how many products take that many seconds, from the fastest of five measurements."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        work(50)
        times.append(time.perf_counter() - begin)
    return max(1, round(50 * seconds / min(times)))


def timed_step(log: MetricsLog, step: int, num_metrics: int, num_products: int) -> float:
    begin = time.perf_counter()
    work(num_products)
    log.log(step, {"time/step_seconds": 1.0} | {f"policy/number_{index}": step / 7 for index in range(num_metrics)})
    return time.perf_counter() - begin


@click.command()
@click.option("--steps", type=click.IntRange(min=4), default=60, help="Pairs of steps.")
@click.option("--metrics", type=click.IntRange(min=1), default=120, help="Numbers of a record.")
@click.option("--work-seconds", type=float, default=1.0, help="Work of a step besides logging.")
def main(steps: int, metrics: int, work_seconds: float) -> None:
    num_products = products_in(work_seconds)
    with tempfile.TemporaryDirectory() as folder:
        plain_dir, tracked_dir = Path(folder) / "plain", Path(folder) / "tracked"
        with MetricsLog(plain_dir, 0) as plain, MetricsLog(tracked_dir, 0) as tracked:
            clients = (
                MlflowTracker(MlflowConfig(enabled=True), tracked_dir, {}),
                WandbTracker(WandbConfig(enabled=True, mode="offline"), tracked_dir, {}),
            )
            tracked.trackers = [Tracker(client, click.echo) for client in clients]
            for step in range(3):  # The first steps import the packages and begin the runs.
                timed_step(plain, step, metrics, num_products)
                timed_step(tracked, step, metrics, num_products)
            while any(tracker.records or tracker.last_step is None for tracker in tracked.trackers):
                time.sleep(0.1)
            pairs = [
                (timed_step(plain, step, metrics, num_products), timed_step(tracked, step, metrics, num_products))
                for step in range(3, steps + 3)
            ]
            for tracker in tracked.trackers:
                tracker.close()
    rng = random.Random(0)
    drawn = [ratio(rng.choices(pairs, k=len(pairs))) for _ in range(2000)]
    low, high = sorted(drawn)[50], sorted(drawn)[1949]
    click.echo(f"step without trackers: {statistics.mean(one for one, _ in pairs):.4f} s, {len(pairs)} pairs")
    click.echo(f"step with MLflow and W&B: {statistics.mean(other for _, other in pairs):.4f} s")
    click.echo(f"ratio: {ratio(pairs):.4f} (95 % interval {low:.4f} to {high:.4f})")


def ratio(pairs: list[tuple[float, float]]) -> float:
    return sum(other for _, other in pairs) / sum(one for one, _ in pairs)


if __name__ == "__main__":
    main()
