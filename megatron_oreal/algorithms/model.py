"""What an algorithm asks of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs, TokenStream
from megatron_oreal.types import Metrics as Metrics

Loss = Callable[[TokenOutputs, Microbatch], LossOutput]


class Model(Protocol):
    """The part of models.trainable.TrainableModel that an algorithm drives."""

    def forward(self, batch: Batch, stream: TokenStream) -> None:
        """Fills the stream of every micro-batch with the head's values."""

    def measure(self, batch: Batch, loss: Loss) -> Metrics:
        """The loss's metrics without an update."""

    def train_step(self, batch: Batch, loss: Loss) -> Metrics:
        """One optimizer step."""

    def sum_over_data(self, values: Tensor) -> Tensor:
        """The sum over data-parallel ranks."""
