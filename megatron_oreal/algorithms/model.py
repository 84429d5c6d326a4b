"""Defines what an algorithm calls on models, what it calls to build them, and what the training loop calls on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_oreal.config import HeadInit, ScalarModelConfig
from megatron_oreal.data.packing import PackingPlan
from megatron_oreal.types import Batch, Group, LossOutput, Microbatch, TokenOutputs, TokenStream
from megatron_oreal.types import Metrics as Metrics

Loss = Callable[[TokenOutputs, Microbatch], LossOutput]


class Model(Protocol):
    """The part of models.trainable.TrainableModel that an algorithm drives.

    `keep` names a field of the micro-batches, for example "old_logprobs". The pass writes the head's detached values of
    each micro-batch there before it evaluates the loss, so that the loss, and later passes, can compare with them.
    Without `keep`, a pass that evaluates a loss writes nothing.
    """

    def forward(self, batch: Batch, stream: TokenStream) -> None:
        """Fills the stream of every micro-batch with the head's values, without a loss."""

    def measure(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> Metrics:
        """Evaluates the loss and returns its metrics; it updates nothing."""

    def train_step(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> Metrics:
        """Takes one optimizer step and returns the metrics of the loss before that step."""

    def sum_over_data(self, values: Tensor) -> Tensor:
        """Returns the sum over data-parallel ranks."""


class ModelSource(Protocol):
    """Builds the models that an algorithm asks for; run/algorithms.py implements it.

    `num_updates` is the number of optimizer steps that the whole run plans (`planned_updates`); the decay of the
    learning rate ends there.
    """

    @property
    def plan(self) -> PackingPlan: ...

    def policy(self, num_updates: int) -> Model:
        """Builds the policy from the section `policy` of the configuration."""

    def reference(self) -> Model:
        """Builds the reference, the frozen initial policy."""

    def teacher(self, path: Path) -> Model:
        """Builds a frozen model that takes the reference's place; it may have another architecture."""

    def scalar(self, name: str, training: ScalarModelConfig, num_updates: int, head_init: HeadInit = "zero") -> Model:
        """Builds a reward model or a critic, which gives one number a token. `name` is the prefix of its metrics."""


class GroupAlgorithm(Protocol):
    """The methods of an algorithm that the training loop calls."""

    def update(self, groups: Sequence[Group], step: int) -> Metrics:
        """Takes all optimizer steps on these groups. Returns {"train/skipped": 1.0} if they allow no update."""

    def planned_updates(self, step: int) -> dict[str, int]:
        """Returns the number of optimizer steps that each model takes in this step of the run if none is skipped.

        The keys are the models' names. A model's sum over all steps of the run is the `num_updates` that it was built
        with. The learning rates follow this plan: a skipped step, or fewer mini-batches, do not delay a cosine's end.
        """
