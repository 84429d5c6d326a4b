"""Builds the sampler, the verifier and the collector of a run."""

from __future__ import annotations

from megatron_oreal.algorithms.model import GroupAlgorithm
from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig, VerifierConfig
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.collector import GroupCollector
from megatron_oreal.rollout.prefetch import BackgroundCollector
from megatron_oreal.rollout.producer import GroupProducer
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.run.run import Run


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
    config, needs = run.config, run.config.algorithm.sample_needs
    size, seed = config.data.prompts_per_step, config.seed
    if run.engine.is_collective:
        return GroupCollector(run.sampler, run.cursor, run.sampling, config.rollout, size, needs.num_correct, seed)
    producer = None
    if run.layout.is_main:
        producer = GroupProducer(
            sampler=run.sampler,
            cursor=run.cursor.copy(),
            sampling=run.sampling,
            config=config.rollout,
            prompts_per_step=size,
            num_correct=needs.num_correct,
            needs_mixed=needs.needs_mixed,
            seed=seed,
            ledger=run.ledger,
        )
    return BackgroundCollector(producer, run.cursor, config.rollout.staleness, run.start_step, config.num_steps)


def open_verifier(config: VerifierConfig) -> MathVerifier:
    return MathVerifier(num_workers=config.num_workers, cpu_seconds=config.cpu_seconds)
