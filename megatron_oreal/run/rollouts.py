"""Builds the sampler and the collector of a run."""

from __future__ import annotations

from megatron_oreal.algorithms.model import GroupAlgorithm
from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.rewards.verifier import Verifier
from megatron_oreal.rollout.prefetch import PrefetchingCollector
from megatron_oreal.rollout.producer import GroupProducer
from megatron_oreal.rollout.recording import FOLDER, RecordingEngine
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.run.run import Run


def build_sampler(
    config: TrainConfig | SftConfig | EvalRunConfig,
    layout: ParallelLayout,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    verifier: Verifier,
) -> Sampler:
    if config.rollout.record and layout.is_main:
        engine = RecordingEngine(engine, config.run_dir / FOLDER)
    return Sampler(
        engine=engine,
        tokenizer=tokenizer,
        verifier=verifier,
        is_main=layout.is_main,
        require_stop=config.verifier.require_stop,
        stop_strings=tuple(config.rollout.stop_strings),
    )


def build_collector(run: Run[TrainConfig, EncodedPrompt, GroupAlgorithm]) -> PrefetchingCollector:
    config, needs = run.config, run.config.algorithm.sample_needs
    producer = GroupProducer(
        sampler=run.sampler,
        cursor=run.cursor.copy(),
        sampling=run.sampling,
        config=config.rollout,
        prompts_per_step=config.data.prompts_per_step,
        num_correct=needs.num_correct,
        needs_mixed=needs.needs_mixed,
        seed=config.seed,
        ledger=run.ledger,
    )
    run.collector = PrefetchingCollector(producer, run.cursor, run.layout.is_main, run.start_step, config.num_steps)
    return run.collector
