"""Builds the verifier of a run from the section `verifier` of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from megatron_oreal.config import VerifierConfig
from megatron_oreal.parallel.collectives import raise_on_all
from megatron_oreal.rewards import MathVerifier
from megatron_oreal.rewards.function_verifier import FunctionVerifier
from megatron_oreal.rewards.judge import Judge
from megatron_oreal.rewards.judged_verifier import JudgedVerifier
from megatron_oreal.rewards.own_rewards import RewardRange
from megatron_oreal.rewards.remote_verifier import RemoteVerifier
from megatron_oreal.rewards.verifier import Verifier
from megatron_oreal.types import Notify

GIB = 2**30


@contextmanager
def open_verifier(config: VerifierConfig, run_dir: Path, is_main: bool, notify: Notify) -> Iterator[Verifier]:
    """Opens the first rank's verifier and checks it. The other ranks get the rules, which they never use.

    Collective. Raises ValueError on all ranks if responses could not be rewarded, because of a function that cannot be
    imported, a server that does not answer, or a missing API key.
    """
    verifier: Verifier = build_rules(config)
    error: ValueError | None = None
    if is_main:
        try:
            verifier = build_verifier(config, run_dir, notify)
            verifier.check()
        except ValueError as caught:
            error = caught
    with closing(verifier):
        raise_on_all(error)
        yield verifier


def build_verifier(config: VerifierConfig, run_dir: Path, notify: Notify) -> Verifier:
    if config.function:
        return FunctionVerifier(
            config.function,
            config.num_workers,
            config.cpu_seconds,
            int(config.function_memory_gib * GIB),
            RewardRange("verifier.function", config.rewards, config.correct_from),
            notify,
        )
    if config.url:
        rewards = RewardRange("verifier.url", config.rewards, config.correct_from)
        return RemoteVerifier(config.url, config.remote, rewards, notify)
    rules = build_rules(config)
    if not config.judge.is_used:
        return rules
    return JudgedVerifier(rules, Judge(config.judge, run_dir / "judge.sqlite", notify), config.answer_rule)


def build_rules(config: VerifierConfig) -> MathVerifier:
    return MathVerifier(
        config.num_workers, config.cpu_seconds, max_timeouts=config.max_timeouts, answer_rule=config.answer_rule
    )
