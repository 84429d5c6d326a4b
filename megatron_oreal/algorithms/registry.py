"""Lists the algorithms of `megatron-oreal train`, one row each. README.md says how to add one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_oreal.algorithms.model import GroupAlgorithm, ModelSource
from megatron_oreal.algorithms.oreal import Oreal
from megatron_oreal.algorithms.outcome import Outcome, check_objective
from megatron_oreal.algorithms.ppo import Ppo
from megatron_oreal.config import AlgorithmConfig, OrealConfig, OutcomeConfig, PpoConfig, TrainConfig


@dataclass(frozen=True, slots=True)
class AlgorithmEntry:
    """How an algorithm is configured and built."""

    config: type[AlgorithmConfig]  # Its section of the configuration.
    trains: tuple[str, ...]  # The models that it may update; a frozen reference is not among them.
    # The run calls it with the section, the whole configuration and the source of the models.
    build: Callable[[Any, TrainConfig, ModelSource], GroupAlgorithm]
    # The run calls it with the section and the group size before it builds anything. Raises ValueError on a conflict.
    check: Callable[[Any, int], None] | None = None


ALGORITHMS: dict[str, AlgorithmEntry] = {
    "oreal": AlgorithmEntry(OrealConfig, ("policy", "reward_model"), Oreal.build),
    "outcome": AlgorithmEntry(OutcomeConfig, ("policy",), Outcome.build, check_objective),
    "ppo": AlgorithmEntry(PpoConfig, ("policy", "critic"), Ppo.build),
}
