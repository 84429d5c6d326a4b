"""Opens and closes everything that the loops in train.py use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch

from megatron_oreal.algorithms.model import GroupAlgorithm
from megatron_oreal.algorithms.sft import Sft
from megatron_oreal.checkpoint.train_state import TrainState
from megatron_oreal.config import (
    EvalRunConfig,
    RunConfig,
    SftConfig,
    TrainConfig,
)
from megatron_oreal.data.examples import encode_examples, read_examples
from megatron_oreal.data.prompts import EncodedPrompt, PromptCursor, encode_prompts, read_prompts, repeat_by_pass_rate
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.engines.weight_sync import WeightSync
from megatron_oreal.models import parallel
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.observability.alarm_log import AlarmLog
from megatron_oreal.observability.environment import record_environment
from megatron_oreal.observability.hang_channel import open_channel
from megatron_oreal.observability.metrics import MetricsLog, PhaseTimer
from megatron_oreal.observability.progress import Announcer, ProgressBar
from megatron_oreal.observability.watchdog import Watchdog
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.parallel.rendezvous import clear_traffic
from megatron_oreal.rollout.ledger import Ledger
from megatron_oreal.run.algorithms import build_algorithm, build_sft
from megatron_oreal.run.device_defaults import describe, facts_of_start, with_device_defaults
from megatron_oreal.run.devices import device_sharing, make_room_for_models
from megatron_oreal.run.endpoint import open_endpoint
from megatron_oreal.run.engines import open_engine
from megatron_oreal.run.inputs import (
    Inputs,
    check_initial_weights,
    check_teacher,
    check_vocabulary,
    note_sampling,
    note_skipped,
    read_inputs,
)
from megatron_oreal.run.rollouts import build_sampler
from megatron_oreal.run.run import Algorithm, Config, EvalRun, Item, Run
from megatron_oreal.run.run_directory import (
    CHANGEABLE_IN_EVAL,
    CONFIG,
    RunDirectory,
    check_run_dir,
    open_run_directory,
)
from megatron_oreal.run.trackers import build_trackers
from megatron_oreal.run.verifiers import open_verifier
from megatron_oreal.types import TrainingSequence


def open_train(config: TrainConfig) -> AbstractContextManager[Run[TrainConfig, EncodedPrompt, GroupAlgorithm]]:
    """Opens a reinforcement learning run and resumes it from its newest checkpoint. Raises ValueError for bad input."""
    inputs = read_inputs(config)
    architecture = inputs.architecture
    check_teacher(config, architecture, inputs.tokenizer)
    config = with_device_defaults(config, architecture)
    prompts = repeat_by_pass_rate(read_prompts(config.data.prompts, "data.prompts"), config.data.repeats_by_pass_rate)
    encoded, num_skipped = encode_prompts(prompts, inputs.tokenizer, config.data)
    check_vocabulary((prompt.token_ids for prompt in encoded), architecture)
    note_skipped(inputs.notes, num_skipped, "prompts longer than data.max_prompt_tokens")
    if len(encoded) < config.data.prompts_per_step:
        inputs.notes.append(
            f"data.prompts holds {len(encoded)} usable prompts, fewer than data.prompts_per_step="
            f"{config.data.prompts_per_step}: a step asks some of them more than once"
        )
    note_sampling(inputs.notes, config)
    cursor = PromptCursor(encoded, config.data.shuffle, config.seed)
    check_initial_weights(config, architecture)
    check_run_dir(config)
    return open_run(config, inputs, cursor, build_algorithm, keeps_responses=config.rollout.ledger)


def open_sft(config: SftConfig) -> AbstractContextManager[Run[SftConfig, TrainingSequence, Sft]]:
    """Opens a supervised run and resumes it from its newest checkpoint. Raises ValueError for bad input."""
    inputs = read_inputs(config)
    architecture = inputs.architecture
    config = with_device_defaults(config, architecture)
    sequences, num_skipped = encode_examples(read_examples(config.data.examples), inputs.tokenizer, config.data)
    check_vocabulary((sequence.token_ids for sequence in sequences), architecture)
    note_skipped(inputs.notes, num_skipped, "examples longer than data.max_tokens or data.max_prompt_tokens")
    cursor = PromptCursor(sequences, config.data.shuffle, config.seed)
    check_run_dir(config)
    return open_run(config, inputs, cursor, build_sft, keeps_responses=False)


@contextmanager
def open_eval(config: EvalRunConfig) -> Iterator[EvalRun]:
    """Opens an evaluation. It has no trainer; the engine's own copy of the model answers. Raises ValueError."""
    inputs = read_inputs(config)
    config = with_device_defaults(config, inputs.architecture)
    check_run_dir(config, CHANGEABLE_IN_EVAL)
    with ExitStack() as stack:
        layout = stack.enter_context(open_layout(config))
        directory = stack.enter_context(open_run_directory(config, layout.is_main, CHANGEABLE_IN_EVAL))
        announce = Announcer(layout.is_main, config.run_dir / "log.txt")
        for line in clear_traffic():
            announce(line)
        verifier = stack.enter_context(open_verifier(config.verifier, config.run_dir, layout.is_main, announce))
        engine = stack.enter_context(open_engine(config, layout, announce, inputs.tokenizer.decode))
        progress = ProgressBar.silent()
        if layout.is_main:
            directory.write(config)
            answers = sum(map(len, inputs.eval_prompts.values())) * (config.eval.greedy + config.eval.num_samples)
            log_file = config.run_dir / "log.txt"
            progress = announce.progress = ProgressBar(answers, 0, config.run_dir.name, log_file, unit="answer")
        for note in (*directory.notes, *inputs.notes):
            progress.note(note)
        yield EvalRun(
            config=config,
            layout=layout,
            sampler=build_sampler(config, layout, engine, inputs.tokenizer, verifier),
            sampling=inputs.sampling,
            datasets=inputs.eval_prompts,
            notes=inputs.notes,
            progress=stack.enter_context(progress),
        )


@contextmanager
def open_layout(config: TrainConfig | SftConfig | EvalRunConfig) -> Iterator[ParallelLayout]:
    has_servers_elsewhere = config.rollout.engine == "sglang" and config.rollout.sglang.endpoints_file is not None
    layout = parallel.initialize(config.parallel, config.seed, config.deterministic, has_servers_elsewhere)
    try:
        yield layout
    except BaseException:
        if layout.world_size == 1:  # with several ranks, finalizing would wait for ranks that are inside a collective
            parallel.finalize()
        raise
    parallel.finalize()


@contextmanager
def open_run(
    config: Config,
    inputs: Inputs,
    cursor: PromptCursor[Item],
    build: Callable[[Config, ParallelLayout], tuple[Algorithm, dict[str, TrainableModel]]],
    keeps_responses: bool,  # whether the ledger keeps what the engine generates
) -> Iterator[Run[Config, Item, Algorithm]]:
    """Opens what every kind of training run has, restores the newest checkpoint and pushes the policy's weights."""
    with ExitStack() as stack:
        layout = stack.enter_context(open_layout(config))
        directory: RunDirectory = stack.enter_context(open_run_directory(config, layout.is_main))
        watchdog = stack.enter_context(open_watchdog(config, layout, directory))
        announce = Announcer(layout.is_main, config.run_dir / "log.txt")
        if sys.stderr.isatty():  # a user on a terminal waits; elsewhere an error must stay the only line
            announce(
                f"loading {config.model.path} on {layout.world_size} process{'es' if layout.world_size > 1 else ''}"
            )
        for line in clear_traffic():
            announce(line)
        verifier = stack.enter_context(open_verifier(config.verifier, config.run_dir, layout.is_main, announce))
        engine = stack.enter_context(open_engine(config, layout, announce, inputs.tokenizer.decode))
        if isinstance(engine, SglangEngine):
            watchdog.server_states = engine.server_states
        make_room_for_models(config, layout, engine)
        algorithm, models = build(config, layout)
        trained = {name: model for name, model in models.items() if model.training is not None}
        train_state = TrainState(config.run_dir / "checkpoints", trained, layout, config.checkpoint)
        restored = train_state.load_latest()
        start_step = num_skipped_steps = 0
        if restored is not None:
            start_step, num_skipped_steps = restored.step, restored.num_skipped_steps
            cursor.restore(restored.cursor)
        watchdog.step = start_step
        log, keeps_responses = MetricsLog.silent(), keeps_responses and layout.is_main
        if layout.is_main:
            directory.write(config)
            record_environment(config.run_dir, start_step, facts_of_start(inputs.architecture, layout))
            log = stack.enter_context(MetricsLog(config.run_dir, start_step))
        ledger = stack.enter_context(Ledger(config.run_dir / "ledger" if keeps_responses else None, start_step))
        progress = announce.progress = stack.enter_context(open_progress(config, layout, start_step))
        if layout.is_main:
            log.trackers = [stack.enter_context(tracker) for tracker in build_trackers(config, announce)]
            log.upload(directory.path / CONFIG)
        run = Run(
            config=config,
            layout=layout,
            cursor=cursor,
            models=models,
            algorithm=algorithm,
            engine=engine,
            sampler=build_sampler(config, layout, engine, inputs.tokenizer, verifier),
            sampling=inputs.sampling,
            weight_sync=WeightSync(models["policy"].weight_stream(), engine, has_fingerprint=keeps_responses),
            devices=device_sharing(config, layout, engine, list(models.values())),
            ledger=ledger,
            eval_prompts=inputs.eval_prompts,
            train_state=train_state,
            timer=PhaseTimer(synchronizer(layout), on_phase=watchdog.enter),
            watchdog=watchdog,
            log=log,
            progress=progress,
            start_step=start_step,
            step=start_step,
            num_skipped_steps=num_skipped_steps,
        )
        stack.enter_context(open_endpoint(run, config.prometheus, announce))
        if restored is not None:
            run.progress.note(f"resumed at step {start_step} of {config.num_steps} in {config.run_dir}")
        for note in (*directory.notes, describe(config, models["policy"]), *inputs.notes):
            run.progress.note(note)
        if layout.is_main:
            run.alarms = AlarmLog(config.run_dir, start_step, config.alarms, run.progress.note)
        if isinstance(engine, SglangEngine):
            engine.lending_devices = partial(run.devices.training, pushes=False)
        run.push_weights(start_step)
        run.devices.generate()
        watchdog.enter("other")
        yield run


def open_watchdog(config: RunConfig, layout: ParallelLayout, directory: RunDirectory) -> Watchdog:
    """Opens the watchdog of this rank, which releases the run directory before it ends the run."""
    watchdog = Watchdog(config.watchdog, config.run_dir, open_channel(layout.rank, layout.world_size))
    if directory.lock is not None:
        watchdog.at_end.append(directory.lock.release)
    return watchdog


def synchronizer(layout: ParallelLayout) -> Callable[[], None] | None:
    return torch.cuda.synchronize if layout.device.type == "cuda" else None


def open_progress(config: RunConfig, layout: ParallelLayout, start_step: int) -> ProgressBar:
    if not layout.is_main:
        return ProgressBar.silent()
    description = config.run_dir.name
    return ProgressBar(config.num_steps, start_step, description, log_file=config.run_dir / "log.txt")
