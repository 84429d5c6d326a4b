"""Builds and closes everything that the loops in train.py use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError

from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.checkpoint.hf import save_hf
from megatron_oreal.checkpoint.train_state import CheckpointError, Progress, TrainState
from megatron_oreal.config import (
    EvalRunConfig,
    ModelRunConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
    VerifierConfig,
    to_yaml,
)
from megatron_oreal.config_algorithms import OrealConfig, OutcomeConfig
from megatron_oreal.data.examples import encode_examples, read_examples
from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor, encode_prompts, read_prompts, repeat_by_pass_rate
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.generation import DeviceSharing, device_sharing, open_engine
from megatron_oreal.inputs import (
    CHANGEABLE_IN_EVAL,
    Inputs,
    check_initial_weights,
    check_run_dir,
    check_vocabulary,
    note_skipped,
    read_inputs,
)
from megatron_oreal.models import parallel
from megatron_oreal.models.parallel import ParallelLayout
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.metrics import Metrics, MetricsLog, PhaseTimer
from megatron_oreal.observability.progress import Announcer, ProgressBar
from megatron_oreal.recipes import GroupAlgorithm, build_algorithm, build_sft
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.background import BackgroundCollector
from megatron_oreal.rollout.collection import GroupCollector
from megatron_oreal.rollout.engine import RolloutEngine, SamplingParams
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.rollout.production import GroupProducer
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.rollout.weight_sync import WeightSync
from megatron_oreal.types import TrainingSequence

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
    ledger: Ledger  # without a folder where no engine needs one
    eval_prompts: Mapping[str, list[EncodedPrompt]]
    train_state: TrainState
    timer: PhaseTimer
    log: MetricsLog | None  # on the first rank
    progress: ProgressBar
    start_step: int = 0
    num_skipped_steps: int = 0
    metrics: Metrics = field(default_factory=dict)  # of the step under way

    def record(self, metrics: Metrics) -> None:
        self.metrics |= metrics

    def count_skipped(self, step: int) -> None:
        """A step whose groups gave the algorithm nothing to learn from."""
        if self.metrics["train/skipped"]:
            self.num_skipped_steps += 1
            self.progress.note(f"step {step} skipped: its groups hold nothing that the algorithm learns from")
        self.metrics["train/num_skipped_steps"] = self.num_skipped_steps

    def push_weights(self, version: int) -> None:
        """The policy to the engine, which answers with it from then on. Collective."""
        self.devices.receive()
        self.record(self.weight_sync.push(version).metrics())
        if self.weight_sync.fingerprint:
            self.ledger.set_weights(version, self.weight_sync.fingerprint)

    def save(self, step: int) -> None:
        evaluation = {name: value for name, value in self.metrics.items() if name.startswith("eval/")}
        with self.devices.training(pushes=False):
            self.train_state.save(Progress(step, self.cursor.state(), self.num_skipped_steps, evaluation))
        self.ledger.remove_before(step)

    def finish_step(self, step: int) -> None:
        """Writes the step's record."""
        self.metrics |= self.timer.flush()
        self.metrics |= self.engine.flush_metrics()
        self.metrics |= rates(self.metrics)
        for model in self.models.values():
            self.metrics |= model.flush_seconds()
        if self.log is not None:
            self.log.log(step, self.metrics)
        self.metrics = {}

    def export(self) -> None:
        """The policy as a Hugging Face directory, RUN_DIR/hf, where the configuration asks for it."""
        if not self.config.checkpoint.export_hf:
            return
        model, out = self.config.model, self.config.run_dir / "hf"
        try:
            with self.devices.training(pushes=False):
                save_hf(self.weight_sync.stream, model.path, model.tokenizer_path, out, self.layout.is_main)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise CheckpointError(f"{out} could not be written ({error}); the checkpoints stay") from None


def rates(metrics: Metrics) -> Metrics:
    """Tokens a second of the phases that have both."""
    counted = {"rollout": "rollout/num_tokens", "update": "train/num_tokens"}
    found = {}
    for phase, name in counted.items():
        seconds = metrics.get(f"time/{phase}_seconds", 0.0)
        if name in metrics and seconds > 0:
            found[f"time/{phase}_tokens_per_second"] = metrics[name] / seconds
    return found


@contextlib.contextmanager
def open_train(config: TrainConfig) -> Iterator[Run[TrainConfig, EncodedPrompt, GroupAlgorithm]]:
    """Everything of a reinforcement learning run, resumed where its folder says. Raises ValueError for bad input."""
    inputs = read_inputs(config)
    architecture = inputs.architecture
    prompts = repeat_by_pass_rate(read_prompts(config.data.prompts, "data.prompts"), config.data.repeats_by_pass_rate)
    encoded, num_skipped = encode_prompts(prompts, inputs.tokenizer, config.data)
    check_vocabulary((prompt.token_ids for prompt in encoded), architecture)
    note_skipped(inputs.notes, num_skipped, "prompts longer than data.max_prompt_tokens")
    cursor = PromptCursor(encoded, config.data.shuffle, config.seed)
    check_initial_weights(config, architecture)
    check_run_dir(config)
    with opened_layout(config) as layout, opened_engine(config, layout) as (engine, announce):
        algorithm, models = build_algorithm(config, layout)
        with assembled(config, layout, engine, announce, inputs, models, algorithm, cursor) as run:
            yield run


@contextlib.contextmanager
def open_sft(config: SftConfig) -> Iterator[Run[SftConfig, TrainingSequence, Sft]]:
    """Everything of a supervised run. Raises ValueError for bad input."""
    inputs = read_inputs(config)
    architecture = inputs.architecture
    sequences, num_skipped = encode_examples(read_examples(config.data.examples), inputs.tokenizer, config.data)
    check_vocabulary((sequence.prompt_ids + sequence.response_ids for sequence in sequences), architecture)
    note_skipped(inputs.notes, num_skipped, "examples longer than data.max_tokens or data.max_prompt_tokens")
    cursor = PromptCursor(sequences, config.data.shuffle, config.seed)
    check_run_dir(config)
    with opened_layout(config) as layout, opened_engine(config, layout) as (engine, announce):
        algorithm, models = build_sft(config, layout)
        with assembled(config, layout, engine, announce, inputs, models, algorithm, cursor) as run:
            yield run


@dataclass(slots=True)
class EvalRun:
    config: EvalRunConfig
    layout: ParallelLayout
    sampler: Sampler
    sampling: SamplingParams
    datasets: Mapping[str, list[EncodedPrompt]]
    notes: list[str]  # what was left out
    progress: ProgressBar


@contextlib.contextmanager
def open_eval(config: EvalRunConfig) -> Iterator[EvalRun]:
    """Everything of an evaluation: no trainer, the engine's own copy of the model answers. Raises ValueError."""
    inputs = read_inputs(config)
    check_run_dir(config, CHANGEABLE_IN_EVAL)
    with opened_layout(config) as layout, opened_engine(config, layout) as (engine, announce), ExitStack() as stack:
        verifier = stack.enter_context(open_verifier(config.verifier)) if layout.is_main else None
        progress = ProgressBar.silent()
        if layout.is_main:
            write_atomically(config.run_dir / "config.yaml", to_yaml(config))
            answers = sum(map(len, inputs.eval_prompts.values())) * (config.eval.greedy + config.eval.num_samples)
            log_file = config.run_dir / "log.txt"
            progress = announce.progress = ProgressBar(answers, 0, config.run_dir.name, log_file, unit="answer")
        for note in inputs.notes:
            progress.note(note)
        yield EvalRun(
            config=config,
            layout=layout,
            sampler=build_sampler(config, engine, inputs.tokenizer, verifier),
            sampling=inputs.sampling,
            datasets=inputs.eval_prompts,
            notes=inputs.notes,
            progress=stack.enter_context(progress),
        )


@contextlib.contextmanager
def opened_layout(config: ModelRunConfig) -> Iterator[ParallelLayout]:
    layout = parallel.initialize(config.parallel, config.seed, config.deterministic)
    try:
        yield layout
    except BaseException:
        if layout.world_size == 1:  # finalizing would wait for ranks that are inside a collective
            parallel.finalize()
        raise
    parallel.finalize()


@contextlib.contextmanager
def opened_engine(
    config: TrainConfig | SftConfig | EvalRunConfig, layout: ParallelLayout
) -> Iterator[tuple[RolloutEngine, Announcer]]:
    announce = Announcer(layout.is_main, config.run_dir / "log.txt")
    with open_engine(config, layout, announce) as engine:
        yield engine, announce


@contextlib.contextmanager
def assembled(
    config: Config,
    layout: ParallelLayout,
    engine: RolloutEngine,
    announce: Announcer,
    inputs: Inputs,
    models: Mapping[str, TrainableModel],
    algorithm: Algorithm,
    cursor: PromptCursor[Item],
) -> Iterator[Run[Config, Item, Algorithm]]:
    """What every kind of run has around its models; restores the newest checkpoint."""
    with ExitStack() as stack:
        verifier = stack.enter_context(open_verifier(config.verifier)) if layout.is_main else None
        trained = {name: model for name, model in models.items() if model.training is not None}
        train_state = TrainState(config.run_dir / "checkpoints", trained, layout, config.checkpoint)
        restored = train_state.load_latest()
        start_step = num_skipped_steps = 0
        if restored is not None:
            start_step, num_skipped_steps = restored.step, restored.num_skipped_steps
            cursor.restore(restored.cursor)
        if layout.is_main:
            write_atomically(config.run_dir / "config.yaml", to_yaml(config))
        log = stack.enter_context(MetricsLog(config.run_dir, start_step)) if layout.is_main else None
        keeps_responses = layout.is_main and not engine.is_collective and config.rollout.ledger
        ledger = stack.enter_context(Ledger(config.run_dir / "ledger" if keeps_responses else None, start_step))
        progress = announce.progress = stack.enter_context(open_progress(config, layout, start_step))
        run = Run(
            config=config,
            layout=layout,
            cursor=cursor,
            models=models,
            algorithm=algorithm,
            engine=engine,
            sampler=build_sampler(config, engine, inputs.tokenizer, verifier),
            sampling=inputs.sampling,
            weight_sync=WeightSync(models["policy"].weight_stream(), engine, has_fingerprint=keeps_responses),
            devices=device_sharing(config, layout, engine, list(models.values())),
            ledger=ledger,
            eval_prompts=inputs.eval_prompts,
            train_state=train_state,
            timer=PhaseTimer(synchronizer(layout)),
            log=log,
            progress=progress,
            start_step=start_step,
            num_skipped_steps=num_skipped_steps,
        )
        if restored is not None:
            run.progress.note(f"resumed at step {start_step} of {config.num_steps} in {config.run_dir}")
        for note in inputs.notes:
            run.progress.note(note)
        run.push_weights(start_step)
        run.devices.generate()
        yield run


def build_sampler(
    config: TrainConfig | SftConfig | EvalRunConfig,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    verifier: MathVerifier | None,
) -> Sampler:
    stop_strings = tuple(config.rollout.stop_strings)
    return Sampler(engine, tokenizer, verifier, config.verifier.require_stop, stop_strings, config.verifier.answer_rule)


def build_collector(
    run: Run[TrainConfig, EncodedPrompt, GroupAlgorithm],
) -> GroupCollector | BackgroundCollector:
    config, algorithm = run.config, run.config.algorithm
    num_correct, needs_mixed = 0, isinstance(algorithm, OrealConfig) and algorithm.selection != "all"
    if isinstance(algorithm, OutcomeConfig):
        needs_mixed = algorithm.dynamic_sampling
        if algorithm.objective == "pure_rejection_sampling":
            num_correct = algorithm.num_correct
    size, seed = config.data.prompts_per_step, config.seed
    if run.engine.is_collective:
        return GroupCollector(run.sampler, run.cursor, run.sampling, config.rollout, size, num_correct, seed)
    producer = None
    if run.layout.is_main:
        producer = GroupProducer(
            sampler=run.sampler,
            cursor=run.cursor.copy(),
            sampling=run.sampling,
            config=config.rollout,
            prompts_per_step=size,
            num_correct=num_correct,
            needs_mixed=needs_mixed,
            seed=seed,
            ledger=run.ledger,
        )
    return BackgroundCollector(producer, run.cursor, config.rollout.staleness, run.start_step, config.num_steps)


def open_verifier(config: VerifierConfig) -> MathVerifier:
    return MathVerifier(num_workers=config.num_workers, cpu_seconds=config.cpu_seconds)


def synchronizer(layout: ParallelLayout) -> Callable[[], None] | None:
    return torch.cuda.synchronize if layout.device.type == "cuda" else None


def open_progress(config: RunConfig, layout: ParallelLayout, start_step: int) -> ProgressBar:
    if not layout.is_main:
        return ProgressBar.silent()
    description = config.run_dir.name
    return ProgressBar(config.num_steps, start_step, description, log_file=config.run_dir / "log.txt")
