"""Builds the sampler, the verifier and the collector of a run."""

from __future__ import annotations

from megatron_oreal.config import EvalRunConfig, OrealConfig, OutcomeConfig, SftConfig, TrainConfig, VerifierConfig
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.data.tokenizer import Tokenizer
from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rollout.collector import GroupCollector
from megatron_oreal.rollout.prefetch import BackgroundCollector
from megatron_oreal.rollout.producer import GroupProducer
from megatron_oreal.rollout.sampler import Sampler
from megatron_oreal.run.algorithms import GroupAlgorithm
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
    return MathVerifier(config.num_workers, config.cpu_seconds, max_timeouts=config.max_timeouts)
