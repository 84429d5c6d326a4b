"""A model small enough for arithmetic by hand: one number for every token of the vocabulary."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from megatron_oreal.types import Batch, LossOutput, Microbatch, TokenOutputs, TokenStream

Loss = Callable[[TokenOutputs, Microbatch], LossOutput]
VOCABULARY = 64


class TableModel:
    """The Model protocol in plain torch, with SGD. The table holds log-probs of labels, or scores of tokens."""

    def __init__(self, name: str, table: Mapping[int, float], *, scores: bool = False, lr: float = 0.0) -> None:
        self.name, self.scores, self.lr = name, scores, lr
        values = torch.zeros(VOCABULARY, dtype=torch.float64)
        for token, value in table.items():
            values[token] = value
        self.table = values.requires_grad_()
        self.batches: list[Batch] = []  # of every call
        self.gradients: list[dict[int, float]] = []  # of every train_step, without zeros up to rounding
        self.num_scheduled = 0  # Optimizer steps that the learning rate has seen, taken or not.

    def outputs(self, microbatch: Microbatch) -> TokenOutputs:
        if self.scores:
            return TokenOutputs(self.table[microbatch.input_ids], None)
        values = torch.where(microbatch.loss_mask, self.table[microbatch.labels], 0.0)
        return TokenOutputs(values, torch.where(microbatch.loss_mask, 0.5, 0.0))

    @torch.no_grad()
    def forward(self, batch: Batch, stream: TokenStream) -> None:
        self.batches.append(batch)
        for microbatch in batch.microbatches:
            setattr(microbatch, stream, self.outputs(microbatch).values)

    @torch.no_grad()
    def measure(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        return self.summed(self.evaluate(batch, loss, keep))

    def train_step(self, batch: Batch, loss: Loss, keep: TokenStream | None = None) -> dict[str, float]:
        self.advance_schedule()
        outputs = self.evaluate(batch, loss, keep)
        (gradient,) = torch.autograd.grad(sum((output.loss for output in outputs), torch.zeros(())), self.table)
        self.gradients.append({token: value for token, value in enumerate(gradient.tolist()) if abs(value) > 1e-12})
        with torch.no_grad():
            self.table -= self.lr * gradient
        return self.summed(outputs)

    def advance_schedule(self) -> None:
        self.num_scheduled += 1

    def evaluate(self, batch: Batch, loss: Loss, keep: TokenStream | None) -> list[LossOutput]:
        self.batches.append(batch)
        losses = []
        for microbatch in batch.microbatches:
            outputs = self.outputs(microbatch)
            if keep is not None:
                setattr(microbatch, keep, outputs.values.detach())
            losses.append(loss(outputs, microbatch))
        return losses

    def sum_over_data(self, values: Tensor) -> Tensor:
        return values

    def summed(self, outputs: list[LossOutput]) -> dict[str, float]:
        metrics = {}
        for name in outputs[0].metrics:
            values: list[Tensor] = [output.metrics[name] for output in outputs]
            assert not any(value.requires_grad for value in values), name
            combine = max if name.endswith("_max") else sum
            metrics[f"{self.name}/{name}"] = combine(float(value) for value in values)
        return metrics


@pytest.fixture
def table_model() -> type[TableModel]:
    return TableModel
