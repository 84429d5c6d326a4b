"""Computes the three matrix products of the loss without logits, in a chosen precision.

`linear_logprob` splits tokens and vocabulary into tiles of t tokens and v columns, and calls these on each; H is the
hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["fp32", "bf16", "fp8_grad"]


@dataclass(frozen=True, slots=True)
class Products:
    """Multiplies inputs cast to float32, or half-precision inputs with float32 sums (CUDA, torch >= 2.8).

    Inputs are never changed. With `accumulate` a product is added to `out`; without it, it is written there.
    """

    grad_dtype: torch.dtype  # of the gradient of the logits as a factor. float32: all inputs are cast to float32

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """Returns [t, H] @ [v, H].T as [t, v] float32, in `out` or new memory. Equal inputs give equal bits."""
        if self.grad_dtype is torch.float32:
            return torch.mm(hidden.float(), weight.float().T, out=out)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    def copied_bytes(self, hidden: Tensor) -> int:
        """Returns the most bytes that a product copies per token's hidden state and per column's weights."""
        in_half = self.grad_dtype is not torch.float32
        makes_copies = hidden.dtype is not self.grad_dtype or (in_half and not adds_to_float32(hidden.device.type))
        return 4 * hidden.shape[1] if makes_copies else 0  # copies of inputs, or a result that is added afterwards

    def grad_hidden(self, grad_logits: Tensor, weight: Tensor, out: Tensor, accumulate: bool) -> None:
        """Computes out [t, H] float32 = or += grad_logits [t, v] @ weight [v, H]."""
        self._product(grad_logits, weight, out, accumulate)

    def grad_weight(self, grad_logits: Tensor, hidden: Tensor, out: Tensor, accumulate: bool) -> None:
        """Computes out [v, H], float32 or half precision, = or += grad_logits.T [v, t] @ hidden [t, H]."""
        self._product(grad_logits.T, hidden, out, accumulate)

    def _product(self, left: Tensor, right: Tensor, out: Tensor, accumulate: bool) -> None:
        left, right = left.to(self.grad_dtype), right.to(self.grad_dtype)
        if out.dtype is self.grad_dtype:
            torch.addmm(out, left, right, beta=1 if accumulate else 0, out=out)  # with 0, `out` is not read
        elif out.dtype is not torch.float32:
            product = left @ right
            out.copy_(product.add_(out) if accumulate else product)
        elif not accumulate:
            torch.mm(left, right, out_dtype=torch.float32, out=out)
        elif adds_to_float32(left.device.type):
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        else:
            out.add_(torch.mm(left, right, out_dtype=torch.float32))


@cache
def adds_to_float32(device_type: str) -> bool:
    """Returns whether half-precision products can be added to float32 sums in place.

    torch before 2.10 has float32 products of half-precision inputs, but refuses a summand that is not of their dtype.
    """
    total = torch.zeros(16, 16, dtype=torch.float32, device=device_type)
    factor = total.bfloat16()
    try:
        torch.addmm(total, factor, factor, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
