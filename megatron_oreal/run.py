"""Builds and closes everything that the loops in train.py use."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
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
from megatron_oreal.config_algorithms import OutcomeConfig
from megatron_oreal.data.examples import encode_examples, read_examples
from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor, encode_prompts, read_prompts, repeat_by_pass_rate
from megatron_oreal.data.tokenizer import Tokenizer
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
from megatron_oreal.models.build import DTYPES
from megatron_oreal.models.parallel import ParallelLayout
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.observability.metrics import Metrics, MetricsLog, PhaseTimer
from megatron_oreal.observability.progress import ProgressBar
from megatron_oreal.recipes import GroupAlgorithm, build_algorithm, build_sft
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.collection import GroupCollector
from megatron_oreal.rollout.engine import RolloutEngine, SamplingParams
from megatron_oreal.rollout.local import LocalEngine
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
    sampler: Sampler
    sampling: SamplingParams
    weight_sync: WeightSync
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

    def save(self, step: int) -> None:
        evaluation = {name: value for name, value in self.metrics.items() if name.startswith("eval/")}
        self.train_state.save(Progress(step, self.cursor.state(), self.num_skipped_steps, evaluation))

    def finish_step(self, step: int) -> None:
        """Writes the step's record."""
        self.metrics |= self.timer.flush()
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
    with opened_layout(config) as layout:
        algorithm, models = build_algorithm(config, layout)
        with assembled(config, layout, inputs, models, algorithm, cursor) as run:
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
    with opened_layout(config) as layout:
        algorithm, models = build_sft(config, layout)
        with assembled(config, layout, inputs, models, algorithm, cursor) as run:
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
    with opened_layout(config) as layout, ExitStack() as stack:
        verifier = stack.enter_context(open_verifier(config.verifier)) if layout.is_main else None
        engine = local_engine(config, layout)
        stack.callback(engine.close)
        progress = ProgressBar.silent()
        if layout.is_main:
            write_atomically(config.run_dir / "config.yaml", to_yaml(config))
            answers = sum(map(len, inputs.eval_prompts.values())) * (config.eval.greedy + config.eval.num_samples)
            log_file = config.run_dir / "log.txt"
            progress = ProgressBar(answers, 0, config.run_dir.name, log_file, unit="answer")
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
def assembled(
    config: Config,
    layout: ParallelLayout,
    inputs: Inputs,
    models: Mapping[str, TrainableModel],
    algorithm: Algorithm,
    cursor: PromptCursor[Item],
) -> Iterator[Run[Config, Item, Algorithm]]:
    """What every kind of run has around its models; restores the newest checkpoint."""
    with ExitStack() as stack:
        verifier = stack.enter_context(open_verifier(config.verifier)) if layout.is_main else None
        engine = local_engine(config, layout)
        stack.callback(engine.close)
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
        run = Run(
            config=config,
            layout=layout,
            cursor=cursor,
            models=models,
            algorithm=algorithm,
            sampler=build_sampler(config, engine, inputs.tokenizer, verifier),
            sampling=inputs.sampling,
            weight_sync=WeightSync(models["policy"].weight_stream(), engine),
            eval_prompts=inputs.eval_prompts,
            train_state=train_state,
            timer=PhaseTimer(synchronizer(layout)),
            log=log,
            progress=stack.enter_context(open_progress(config, layout, start_step)),
            start_step=start_step,
            num_skipped_steps=num_skipped_steps,
        )
        if restored is not None:
            run.progress.note(f"resumed at step {start_step} of {config.num_steps} in {config.run_dir}")
        for note in inputs.notes:
            run.progress.note(note)
        run.weight_sync.push(start_step)
        yield run


def local_engine(config: TrainConfig | SftConfig | EvalRunConfig, layout: ParallelLayout) -> RolloutEngine:
    group = dist.group.WORLD if layout.world_size > 1 else None
    return LocalEngine(config.model.path, layout.device, DTYPES[config.model.dtype], config.rollout.batch_size, group)


def build_sampler(
    config: TrainConfig | SftConfig | EvalRunConfig,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    verifier: MathVerifier | None,
) -> Sampler:
    stop_strings = tuple(config.rollout.stop_strings)
    return Sampler(engine, tokenizer, verifier, config.verifier.require_stop, stop_strings, config.verifier.answer_rule)


def build_collector(run: Run[TrainConfig, EncodedPrompt, GroupAlgorithm]) -> GroupCollector:
    config, algorithm = run.config, run.config.algorithm
    num_correct = 0
    if isinstance(algorithm, OutcomeConfig) and algorithm.objective == "pure_rejection_sampling":
        num_correct = algorithm.num_correct
    return GroupCollector(
        sampler=run.sampler,
        cursor=run.cursor,
        sampling=run.sampling,
        config=config.rollout,
        prompts_per_step=config.data.prompts_per_step,
        num_correct=num_correct,
        seed=config.seed,
    )


def open_verifier(config: VerifierConfig) -> MathVerifier:
    return MathVerifier(num_workers=config.num_workers, cpu_seconds=config.cpu_seconds)


def synchronizer(layout: ParallelLayout) -> Callable[[], None] | None:
    return torch.cuda.synchronize if layout.device.type == "cuda" else None


def open_progress(config: RunConfig, layout: ParallelLayout, start_step: int) -> ProgressBar:
    if not layout.is_main:
        return ProgressBar.silent()
    description = config.run_dir.name
    return ProgressBar(config.num_steps, start_step, description, log_file=config.run_dir / "log.txt")
