"""Defines a run: everything that the loops in train.py use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from safetensors import SafetensorError

from megatron_oreal.algorithms.model import GroupAlgorithm
from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.checkpoint.train_state import CheckpointError, Progress, SavedCheckpoint, TrainState
from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig
from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor
from megatron_oreal.engines.engine import RolloutEngine, SamplingParams
from megatron_oreal.engines.weight_sync import WeightSync
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.observability.alarm_log import AlarmLog
from megatron_oreal.observability.full_disk import describe_os_error
from megatron_oreal.observability.memory import memory_of_process
from megatron_oreal.observability.metrics import Metrics, MetricsLog, PhaseTimer
from megatron_oreal.observability.progress import ProgressBar
from megatron_oreal.observability.watchdog import Watchdog
from megatron_oreal.parallel.collectives import all_gather_object
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.rollout.prefetch import PrefetchingCollector
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.run.devices import DeviceSharing
from megatron_oreal.run.run_directory import keep_users_files
from megatron_oreal.types import TrainingSequence
from megatron_oreal.weights.hf_directory import save_hf

Config = TypeVar("Config", TrainConfig, SftConfig)
Item = TypeVar("Item", EncodedPrompt, TrainingSequence)
Algorithm = TypeVar("Algorithm", GroupAlgorithm, Sft)


@dataclass(slots=True)
class Run(Generic[Config, Item, Algorithm]):
    config: Config
    layout: ParallelLayout
    cursor: PromptCursor[Item]
    models: Mapping[str, TrainableModel]
    algorithm: Algorithm
    engine: RolloutEngine
    sampler: Sampler
    sampling: SamplingParams
    weight_sync: WeightSync
    devices: DeviceSharing
    ledger: Ledger  # has no folder on the other ranks and where no response is kept
    eval_prompts: Mapping[str, list[EncodedPrompt]]
    train_state: TrainState
    timer: PhaseTimer
    watchdog: Watchdog
    log: MetricsLog  # only the first rank's writes files
    progress: ProgressBar
    alarms: AlarmLog | None = None  # only the first rank has it
    start_step: int = 0
    num_skipped_steps: int = 0
    metrics: Metrics = field(default_factory=dict)  # the measurements of the current step so far
    step: int = 0  # the current step
    last_record: Metrics = field(default_factory=dict)  # the record of the previous step
    collector: PrefetchingCollector | None = None  # makes the groups when training on rewards

    def record(self, metrics: Metrics) -> None:
        self.metrics |= metrics

    def count_skipped(self, step: int) -> None:
        """Counts the step as skipped if its groups gave the algorithm nothing to learn from."""
        if self.config.rollout.only:
            return
        if self.metrics["train/skipped"]:
            self.num_skipped_steps += 1
            self.progress.note(f"step {step} skipped: the algorithm learns nothing from it{what_is_in(self.metrics)}")
        self.metrics["train/num_skipped_steps"] = self.num_skipped_steps

    def complete_updates(self, step: int) -> None:
        """Advances the learning rates to their values after this step, even if the step skipped updates."""
        for name, num_planned in self.algorithm.planned_updates(step).items():
            self.models[name].complete_updates(num_planned)

    def push_weights(self, version: int) -> None:
        """Collective. Sends the policy's weights to the engine, which generates with them from then on."""
        self.devices.receive()
        self.record(self.weight_sync.push(version).metrics())
        if self.weight_sync.fingerprint:
            self.ledger.set_weights(version, self.weight_sync.fingerprint)

    def begin_save(self, step: int) -> None:
        """Copies the state to the host; it is written while training goes on. Collective."""
        self.complete_save()
        evaluation = {name: value for name, value in self.metrics.items() if name.startswith("eval/")}
        with self.devices.training(pushes=False):
            self.train_state.begin(Progress(step, self.cursor.state(), self.num_skipped_steps, evaluation))

    def poll_save(self) -> None:
        """Completes the checkpoint under way if it is written by now. Collective."""
        self._after_save(self.train_state.poll())

    def complete_save(self) -> None:
        """Waits for the checkpoint under way, if there is one. Collective."""
        self._after_save(self.train_state.complete())

    def _after_save(self, saved: SavedCheckpoint | None) -> None:
        if saved is None:
            return
        self.ledger.remove_before(saved.step)  # What an older checkpoint needs stays until a newer one is complete.
        self.record(
            {"time/in_background/checkpoint": saved.seconds, "time/in_background/checkpoint_bytes": saved.num_bytes}
        )

    def finish_step(self, step: int) -> None:
        """Collective. Writes the step's record and reports alarms."""
        self.metrics |= self.timer.flush()
        self.metrics |= self.engine.flush_metrics()
        self.metrics |= rates(self.metrics)
        for model in self.models.values():
            self.metrics |= model.flush_seconds()
        self.metrics |= largest(all_gather_object(memory_of_process()))
        self.log.log(step, self.metrics)
        if self.alarms is not None:
            self.alarms.observe(step, self.metrics)
        self.last_record, self.metrics, self.step = self.metrics, {}, step + 1
        self.watchdog.step = step + 1

    def export(self) -> None:
        """Writes the policy as a Hugging Face directory, RUN_DIR/hf, if the configuration requests it."""
        if not self.config.checkpoint.export_hf:
            return
        model, out = self.config.model, self.config.run_dir / "hf"
        try:
            if self.layout.is_main:
                keep_users_files(out)
            with self.devices.training(pushes=False):
                save_hf(self.weight_sync.stream, model.path, model.tokenizer_path, out, self.layout.is_main)
            self.progress.note(f"the trained model is in {out} (Hugging Face format)")
        except SafetensorError as error:  # safetensors raises this when the disk is full
            raise CheckpointError(f"{out}: {describe_os_error(error)}; the checkpoints stay") from None


def what_is_in(metrics: Metrics) -> str:
    """Describes the groups of a step: " (6 all incorrect, 2 all correct; 40 of 64 samples without an answer)"."""
    if "rollout/num_samples" not in metrics:
        return ""
    kinds = ("mixed", "all_incorrect", "all_correct", "unjudged")
    counts = [(int(metrics[f"reward/groups_{kind}"]), kind.replace("_", " ")) for kind in kinds]
    parts = [", ".join(f"{count} {kind}" for count, kind in counts if count)]
    num_samples = int(metrics["rollout/num_samples"])
    if num_unanswered := int(metrics["verifier/no_answer"]):
        parts.append(f"{num_unanswered} of {num_samples} samples without an answer")
    if share := metrics["rollout/length_limit_share"]:
        parts.append(f"{share:.0%} of the samples cut at the length limit")
    return f" ({'; '.join(parts)})"


def largest(of_ranks: Sequence[Metrics]) -> Metrics:
    """Returns the largest value of each metric over the ranks."""
    names = {name: None for metrics in of_ranks for name in metrics}
    return {name: max(metrics[name] for metrics in of_ranks if name in metrics) for name in names}


def rates(metrics: Metrics) -> Metrics:
    """Computes tokens per second for each phase with known tokens and seconds."""
    counted = {"rollout": "rollout/num_tokens", "update": "train/num_tokens"}
    found = {}
    for phase, name in counted.items():
        seconds = metrics.get(f"time/{phase}_seconds", 0.0)
        if name in metrics and seconds > 0:
            found[f"time/{phase}_tokens_per_second"] = metrics[name] / seconds
    return found


@dataclass(slots=True)
class EvalRun:
    config: EvalRunConfig
    layout: ParallelLayout
    sampler: Sampler
    sampling: SamplingParams
    datasets: Mapping[str, list[EncodedPrompt]]
    notes: list[str]  # lines for the log about what was left out
    progress: ProgressBar
