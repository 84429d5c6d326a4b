"""Liger's CUTLASS operator for Hopper (liger-cute-kernels) as a method of tools/bench/bench_fused_loss.py.

It is configured once a process for the largest problem, starts NVSHMEM over torch.distributed, and gives per-token
losses and their gradients without logits. A wheel built for CUDA 12 needs libcudart.so.12 where the loader finds it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

MAX_TOKENS, MAX_HIDDEN, MAX_COLUMNS = 16384, 5120, 152064


def make_liger_hopper(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """Raises where the machine lacks what it needs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        raise RuntimeError("it needs a Hopper GPU")
    import liger_cute_kernels
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    with_index = torch.device("cuda", torch.cuda.current_device())
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=with_index)
    largest = liger_cute_kernels.FusedLinearCrossEntropyConfig(
        max_tokens=MAX_TOKENS, hidden_size=MAX_HIDDEN, local_vocab_size=MAX_COLUMNS
    )
    liger_cute_kernels.configure(flsce=largest)
    group = dist.group.WORLD

    def losses(hidden: Tensor, weight: Tensor, target: Tensor, _training: bool) -> Tensor:
        # Temperature 1, no ignored target, reduced after each tile, without entropy.
        result = liger_fused_linear_scaled_cross_entropy_tp(hidden, weight, target, group, 1.0, -100, 1, False)
        return result[0] if isinstance(result, tuple) else result

    return losses
