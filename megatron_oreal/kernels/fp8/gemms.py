"""The products of the loss without logits in FP8 (e4m3), behind the same protocol as the plain ones.

Gradients tolerate FP8: quantised operands give 3 to 4 % relative error. Values do not by themselves: the largest logits
of a token are computed again exactly (largest_logits.py), and a gate (gate.py) decides whether the rest may stay.
The arithmetic comes from a backend: torch._scaled_mm (torch_products.py), which also runs on a CPU, or Transformer
Engine (transformer_engine.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_oreal.kernels.fp8.scaled import Fp8Products
from megatron_oreal.kernels.gemms import Gemms, ProductMemory
from megatron_oreal.kernels.tiles import block_bytes, bytes_of_a_call, row_blocks

KEPT_SHARE = 0.2  # of a call's bytes: quantised weights that it keeps. On CUDA both layouts of 19008 x 5120
EXACT_BYTES = 8  # of a logit that is computed again: its column and its value
SEARCH_BYTES = 96  # of the same, while a tile's are merged with those of the tiles before


@dataclass(slots=True)
class QuantizedWeights:
    """Parts of one call's weight, which stays as it is, by role; what does not fit is made again each time."""

    max_bytes: int
    num_bytes: int = 0  # one a number
    _kept: dict[tuple[str, int, torch.Size], tuple[Tensor, Any]] = field(default_factory=dict)

    def get(self, role: str, weight: Tensor, make: Callable[[Tensor], Any]) -> Any:
        place = (role, weight.data_ptr(), weight.shape)
        if place in self._kept:
            return self._kept[place][1]
        made = make(weight)
        if self.num_bytes + weight.numel() <= self.max_bytes:
            self.num_bytes += weight.numel()
            self._kept[place] = weight, made  # while the part is held, nothing else has its address
        return made


class Fp8Gemms:
    """The products of one call of linear_logprob in FP8: those of the gradients, and without `exact` the logits too.

    `exact` computes the logits where FP8 computes the gradients alone. Without it, the `num_exact` largest logits of
    each token are computed again from the inputs as they are.
    """

    def __init__(self, products: Fp8Products, exact: Gemms | None, num_exact: int, is_cuda: bool) -> None:
        self.products = products
        self.exact = exact
        self.num_exact = num_exact if exact is None else 0
        self.weights = QuantizedWeights(int(KEPT_SHARE * bytes_of_a_call(is_cuda)))

    @property
    def grad_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def memory(self, hidden: Tensor, weight: Tensor) -> ProductMemory:
        copied = 2 * hidden.shape[1]  # in FP8, and that transposed
        of_values = ProductMemory() if self.exact is None else self.exact.memory(hidden, weight)
        num_layouts = 2 if self.exact is None else 1
        return ProductMemory(
            element=2,
            token=max(copied, of_values.token, SEARCH_BYTES * self.num_exact),
            column=max(copied, of_values.column),
            scratch=block_bytes(hidden.is_cuda),
            held=min(self.weights.max_bytes, num_layouts * weight.numel()) + EXACT_BYTES * self.num_exact * len(hidden),
        )

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        if self.exact is not None:
            return self.exact.logits(hidden, weight, out)
        return self.products.logits(hidden, self.weights.get("logits", weight, self.products.weight_for_logits), out)

    def exact_logits(self, hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor | None:
        """[t, k] float32 logits of `columns` [t, k]; None where those of `logits` are exact by themselves.

        A sampled token is often not among its row's largest: its own error would be the largest part of the log-prob's.
        """
        return None if self.exact is not None else gathered_logits(hidden, weight, columns)

    def grad_hidden(self, grad_logits: Tensor, weight: Tensor, out: Tensor, accumulate: bool) -> None:
        quantized = self.weights.get("grad_hidden", weight, self.products.weight_for_grad_hidden)
        self.products.grad_hidden(grad_logits, quantized, out, accumulate)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        self.products.grad_weight(grad_logits, hidden, out, accumulate)


def gathered_logits(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """[t, k]: hidden[t] @ weight[columns[t, k]] of the inputs as they are, summed in float32."""
    exact = torch.empty(columns.shape, dtype=torch.float32, device=hidden.device)
    in_half = weight.is_cuda and weight.dtype is not torch.float32
    number_bytes = weight.element_size() + (0 if in_half else 4)
    for rows in row_blocks(len(columns), number_bytes * columns.shape[1] * hidden.shape[1], weight.is_cuda):
        gathered, tokens = weight[columns[rows]], hidden[rows, :, None]
        if in_half:
            product = torch.bmm(gathered, tokens, out_dtype=torch.float32)
        else:
            product = torch.bmm(gathered.float(), tokens.float())
        exact[rows] = product[:, :, 0]
    return exact
