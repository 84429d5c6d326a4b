"""The loops: reinforcement learning, and the supervised warm-up before it.

A step's record holds what was measured of the policy that began the step: record 0 shows the initial policy, the last
one, number num_steps, is an evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from megatron_oreal.config import SftConfig, TrainConfig
from megatron_oreal.evaluation.held_out import evaluate
from megatron_oreal.rollout.metrics import rollout_metrics, staleness_metrics, text_metrics
from megatron_oreal.rollout.records import write_rollouts
from megatron_oreal.run.open import open_sft, open_train
from megatron_oreal.run.rollouts import build_collector
from megatron_oreal.run.run import Run


def train(config: TrainConfig) -> None:
    with open_train(config) as run, closing(build_collector(run)) as collector:
        for step in steps(run):
            with run.timer("rollout"), naming_the_step(step):
                collected = collector.collect(step)
                if run.layout.is_main:
                    write_rollouts(config.run_dir / "rollouts" / f"step_{step:06d}.jsonl", collected.sampled)
            run.record(
                rollout_metrics(collected.sampled) | staleness_metrics(collected.groups, step) | collected.metrics
            )
            for note in collected.notes:
                run.progress.note(note)
            if run.log is not None:
                run.record(text_metrics(collected.sampled))
            with run.devices.training(pushes=True):
                with run.timer("update"), naming_the_step(step):
                    run.record(run.algorithm.update(collected.groups, step))
                with run.timer("weight_sync"):
                    run.push_weights(version=step + 1)
            run.count_skipped(step)
            warn_of_mismatch(run, step)
        run.export()


def sft(config: SftConfig) -> None:
    with open_sft(config) as run:
        for step in steps(run):
            is_due = evaluation_due(run, step + 1)
            with run.devices.training(pushes=is_due):
                with run.timer("update"), naming_the_step(step):
                    run.record(run.algorithm.update(run.cursor.next_batch(config.data.sequences_per_step), step))
                if is_due:
                    with run.timer("weight_sync"):
                        run.push_weights(version=step + 1)
        run.export()


def steps(run: Run[Any, Any, Any]) -> Iterator[int]:
    """Yields each step to train; evaluates and saves between them, and writes each step's record."""
    config = run.config
    for step in range(run.start_step, config.num_steps + 1):
        if evaluation_due(run, step):
            with run.timer("evaluation"), naming_the_step(step):
                run.record(evaluate(run, step))
        if step > run.start_step and (step % config.checkpoint.every == 0 or step == config.num_steps):
            with run.timer("checkpoint"):
                run.save(step)
        if step == config.num_steps:
            break
        yield step
        shown: dict[str, Any] = {name: run.metrics[metric] for name, metric in SHOWN.items() if metric in run.metrics}
        run.finish_step(step)
        run.progress.advance(**shown)
    if run.metrics:
        run.finish_step(config.num_steps)


SHOWN = {"loss": "policy/loss", "reward": "reward/mean", "mixed": "reward/groups_mixed", "skipped": "train/skipped"}


@contextmanager
def naming_the_step(step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"stopped at step {step}: {error}; the checkpoints are untouched. Lower the learning rate in a new "
            "run_dir, or, where the newest checkpoint is broken too, remove it to resume from the one before"
        ) from error


def warn_of_mismatch(run: Run[TrainConfig, Any, Any], step: int) -> None:
    """Where the engine's log-probs are further from the trainer's than `rollout.mismatch_alarm` allows."""
    alarm = run.config.rollout.mismatch_alarm
    if alarm is None or "policy/mismatch" not in run.metrics:
        return
    mismatch = run.metrics["policy/mismatch"]
    run.record({"policy/mismatch_alarm": float(mismatch > alarm)})
    if mismatch > alarm:
        run.progress.note(
            f"step {step}: engine and trainer disagree by {mismatch:.3g} nats a token on average, more than "
            f"rollout.mismatch_alarm={alarm:g}: compare dtypes and kernels, or lower rollout.staleness"
        )


def evaluation_due(run: Run[Any, Any, Any], step: int) -> bool:
    evaluation = run.config.eval
    return bool(evaluation.prompts) and (step % evaluation.every == 0 or step == run.config.num_steps)
