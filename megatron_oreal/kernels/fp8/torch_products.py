"""FP8 products through torch._scaled_mm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.kernels.fp8.scaled import (
    ScaledMatrix,
    Scaling,
    check_capability,
    product_blocks,
    quantize,
    scaled_product,
    store,
)


@dataclass(frozen=True, slots=True)
class TorchProducts:
    """torch._scaled_mm, with one scale a tensor or, for values, a row. Raises ValueError where it cannot run."""

    device: torch.device
    scaling: Scaling

    def __post_init__(self) -> None:
        if self.scaling not in ("tensor", "row"):
            raise ValueError(f"fp8 scaling {self.scaling!r} needs the transformer_engine backend: use tensor or row")
        if self.device.type != "cpu":
            check_capability(self.device, (8, 9), "fp8 through torch._scaled_mm")

    def weight_for_logits(self, weight: Tensor) -> ScaledMatrix:
        return quantize(weight, per_row=self.scaling == "row")

    def weight_for_grad_hidden(self, weight: Tensor) -> ScaledMatrix:
        return quantize(weight, per_row=False).transposed(weight.shape[1])

    def logits(self, hidden: Tensor, weight: ScaledMatrix, out: Tensor | None) -> Tensor:
        return scaled_product(quantize(hidden, per_row=self.scaling == "row"), weight, fast=True, out=out)

    def grad_hidden(self, grad_logits: Tensor, weight: ScaledMatrix, out: Tensor, accumulate: bool) -> None:
        gradient = quantize(grad_logits, per_row=False)
        for rows in product_blocks(out):
            store(scaled_product(gradient.part(rows), weight, fast=False), out[rows], accumulate)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        num_columns, num_hidden = out.shape
        grad_columns = quantize(grad_logits, per_row=False).transposed(num_columns)
        hidden_columns = quantize(hidden, per_row=False).transposed(num_hidden)
        for rows in product_blocks(out):
            store(scaled_product(grad_columns.part(rows), hidden_columns, fast=False), out[rows], accumulate)
