"""Runs the training loops: reinforcement learning, and the supervised warm-up before it.

A step's record holds what was measured of the policy that began the step: record 0 shows the initial policy, and the
last record, number num_steps, is an evaluation alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

from megatron_oreal.config import SftConfig, TrainConfig
from megatron_oreal.evaluation.held_out import evaluate
from megatron_oreal.parallel.collectives import all_gather_object, broadcast_object, wait_for_all_ranks
from megatron_oreal.parallel.stopping import RunStopped, is_asked_to_stop
from megatron_oreal.rollout.metrics import rollout_metrics, staleness_metrics, text_metrics
from megatron_oreal.rollout.prefetch import Collected
from megatron_oreal.rollout.records import write_rollouts
from megatron_oreal.rollout.token_records import sample_key, trained_values, write_token_records
from megatron_oreal.run.final_report import write_final_report
from megatron_oreal.run.open import open_sft, open_train
from megatron_oreal.run.rollouts import build_collector
from megatron_oreal.run.run import Run
from megatron_oreal.types import Group, Metrics


def train(config: TrainConfig) -> None:
    with open_train(config) as run, closing(build_collector(run)) as collector:
        for step in range(run.start_step, config.num_steps):
            begin_step(run, step)
            with run.timer("rollout"), naming_the_step(step):
                collected = collector.collect(step)
                if run.layout.is_main:
                    write_rollouts(config.run_dir / "rollouts" / f"step_{step:06d}.jsonl", collected.sampled)
            record_rollout(run, collected, step)
            with run.devices.training(pushes=True):
                if not config.rollout.only:
                    with run.timer("update"), naming_the_step(step), recording_tokens(run, collected.sampled, step):
                        run.record(measured(config, run.algorithm.update(collected.groups, step)))
                        run.complete_updates(step)
                with run.timer("weight_sync"):
                    run.push_weights(version=step + 1)
            run.count_skipped(step)
            check_mismatch(run, step)
            finish_step(run, step)
        finish(run)


def sft(config: SftConfig) -> None:
    with open_sft(config) as run:
        for step in range(run.start_step, config.num_steps):
            begin_step(run, step)
            is_due = evaluation_due(run, step + 1)
            with run.devices.training(pushes=is_due):
                with run.timer("update"), naming_the_step(step):
                    run.record(run.algorithm.update(run.cursor.next_batch(config.data.sequences_per_step), step))
                    run.complete_updates(step)
                if is_due:
                    with run.timer("weight_sync"):
                        run.push_weights(version=step + 1)
            finish_step(run, step)
        finish(run)


def begin_step(run: Run[Any, Any, Any], step: int) -> None:
    """Evaluates and saves the policy of the previous step if the configuration asks for it at this step.

    Raises RunStopped, after saving, where the first rank was asked to stop.
    """
    if evaluation_due(run, step):
        with run.timer("evaluation"), naming_the_step(step):
            run.record(evaluate(run, step))
    is_last = step == run.config.num_steps
    # Each start makes at least one step; otherwise a job that is too short for a step would be requeued for ever.
    has_worked = step > run.start_step
    is_stopped = has_worked and not is_last and broadcast_object(is_asked_to_stop())
    is_due = step % run.config.checkpoint.every == 0 or is_last or is_stopped
    if has_worked and is_due and not run.config.rollout.only:  # What only generates has not come further.
        with run.timer("checkpoint"):
            run.begin_save(step)
            if is_last or is_stopped:
                run.complete_save()
    else:
        run.poll_save()
    if is_stopped:
        run.progress.note(f"stopped before step {step} by SIGUSR1; the same command continues there")
        wait_for_all_ranks()  # Nobody leaves while others still write the checkpoint.
        raise RunStopped


def finish_step(run: Run[Any, Any, Any], step: int) -> None:
    """Writes the step's record and moves the progress bar."""
    shown: dict[str, Any] = {name: run.metrics[metric] for name, metric in SHOWN.items() if metric in run.metrics}
    run.finish_step(step)
    run.progress.advance(**shown)


def finish(run: Run[Any, Any, Any]) -> None:
    """Evaluates, saves and exports the final policy; its evaluation is the last record."""
    num_steps = run.config.num_steps
    begin_step(run, num_steps)
    if evaluation_due(run, num_steps):
        run.finish_step(num_steps)
    run.watchdog.enter("end")
    write_final_report(run)
    if not run.config.rollout.only:
        run.export()


def record_rollout(run: Run[TrainConfig, Any, Any], collected: Collected, step: int) -> None:
    run.record(rollout_metrics(collected.sampled) | staleness_metrics(collected.groups, step) | collected.metrics)
    if run.layout.is_main:
        run.record(text_metrics(collected.sampled))
    for note in collected.notes:
        run.progress.note(note)


@contextmanager
def recording_tokens(run: Run[TrainConfig, Any, Any], sampled: Sequence[Group], step: int) -> Iterator[None]:
    """Writes the tokens of the step's first groups with what the update inside the block knows of them. Collective."""
    groups = sampled[: run.config.logging.rollout_tokens]
    if not groups:
        yield
        return
    with run.models["policy"].keeping_batches() as batches:
        yield
    wanted = {sample_key(sample) for group in groups for sample in group.samples}
    of_ranks = all_gather_object(trained_values(batches, wanted), run.layout.data_group)
    if run.layout.is_main:
        path = run.config.run_dir / "rollout_tokens" / f"step_{step:06d}.jsonl"
        values = {key: value for found in of_ranks for key, value in found.items()}
        decode, kind = run.sampler.tokenizer.decode, run.config.rollout.engine_logprobs
        write_token_records(path, groups, values, decode, kind)


def measured(config: TrainConfig, metrics: Metrics) -> Metrics:
    """Removes the metrics that compare trainer and engine if the engine's log-probs are unknown."""
    if config.rollout.engine_logprobs != "unknown":
        return metrics
    unknown = ("policy/mismatch", "policy/importance")
    return {name: value for name, value in metrics.items() if not name.startswith(unknown)}


SHOWN = {
    "loss": "policy/loss",
    "reward": "reward/mean",
    "mixed": "reward/groups_mixed",
    "skipped": "train/num_skipped_steps",
}


@contextmanager
def naming_the_step(step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"stopped at step {step}: {error}; the checkpoints are untouched. Lower the learning rate in a new "
            "run_dir, or, where the newest checkpoint is broken too, remove it to resume from the one before"
        ) from error


def check_mismatch(run: Run[TrainConfig, Any, Any], step: int) -> None:
    """Raises ValueError, on all ranks, where the engine's log-probs are too far from the trainer's.

    Further than `rollout.mismatch_limit` means that the engine has another model.
    """
    limit, mismatch = run.config.rollout.mismatch_limit, run.metrics.get("policy/mismatch")
    if broadcast_object(limit is not None and mismatch is not None and mismatch > limit):
        raise ValueError(
            f"step {step}: engine and trainer disagree by {mismatch or 0.0:.3g} nats a token on average, more than "
            f"rollout.mismatch_limit={limit:g}: the engine has another model; the checkpoints are untouched. Let the "
            "servers serve model.path, with no flag that changes it"
        )


def evaluation_due(run: Run[Any, Any, Any], step: int) -> bool:
    evaluation = run.config.eval
    return bool(evaluation.prompts) and (step % evaluation.every == 0 or step == run.config.num_steps)
