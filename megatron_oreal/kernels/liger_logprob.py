"""Wraps Liger's operator for Hopper GPUs, which computes the outputs of linear_logprob faster.

The packages are liger-kernel and liger-cute-kernels: CUTLASS kernels that reduce each tile of logits where it is
computed, and exchange the ranks' sums through NVSHMEM. The operator is configured once a process, for the largest call;
its buffers stay on the GPU from then on.

The operator supports only bfloat16 on Hopper GPUs, and neither padded columns of the vocabulary nor FP8 products.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NO_TARGET = -100  # the operator ignores such targets; ours are never negative


@dataclass(frozen=True, slots=True)
class LigerCall:
    """The largest call of a process, for which the operator is configured."""

    max_tokens: int  # of one micro-batch
    hidden_size: int
    num_columns: int  # of this rank's slice of the vocabulary


class LigerOperator:
    """The configured operator. Its construction is a collective of `group`, the tensor-parallel ranks.

    Raises ImportError if a package is missing, and RuntimeError if the operator cannot be configured.
    """

    def __init__(self, call: LigerCall, group: dist.ProcessGroup) -> None:
        self.call, self.group = call, group
        functional: Any = importlib.import_module("liger_kernel.transformers.functional")
        kernels: Any = importlib.import_module("liger_cute_kernels")
        self.function = functional.liger_fused_linear_scaled_cross_entropy_tp
        largest = kernels.FusedLinearCrossEntropyConfig(
            max_tokens=call.max_tokens, hidden_size=call.hidden_size, local_vocab_size=call.num_columns
        )
        kernels.configure(bootstrap_group=group, flsce=largest)

    def fits(self, num_tokens: int) -> bool:
        """Returns whether the operator accepts this many tokens: at least one, at most the configured number."""
        return 0 < num_tokens <= self.call.max_tokens

    def __call__(self, hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Returns (logprobs [T], entropy [T]) in float32, in nats.

        hidden [T, H] and weight [V, H] bfloat16, target [T] int64 global token ids. Differentiable in hidden and
        weight: the gradient of hidden is the whole one, that of weight this rank's, in bfloat16.
        """
        losses, entropy = self.function(hidden, weight, target, self.group, temperature, NO_TARGET, 1, True)
        return -losses, entropy


def missing_for_liger(device: torch.device, dtype: torch.dtype, num_padded: int) -> str:
    """Returns what the operator lacks on this device and for this model, or "" if it lacks nothing.

    num_padded: columns of the vocabulary that belong to no token, over all ranks.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return "it needs a Hopper GPU (compute capability 9.0)"
    if dtype is not torch.bfloat16:
        return "it needs model.dtype=bfloat16"
    if num_padded:
        return f"it knows no padded vocabulary, and {num_padded} columns are padding with this parallel.tensor"
    for package in ("liger_kernel", "liger_cute_kernels"):
        if importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
    return ""
