"""Checks that the head adds to Megatron's main_grad what autograd and Megatron's hook would add there.

torchrun starts this file on any number of data-parallel processes; it also checks overlapped reduction.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging as transformers_logging

from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.kernels import linear_logprob
from megatron_oreal.models import heads, optimizer, parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import LossOutput, Microbatch, TokenOutputs
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import random_sequences, write_tiny_model

SEQUENCES = random_sequences(7)


def main(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    layout = parallel.initialize(ParallelConfig(), seed=0)
    for tied in (False, True):
        path = folder / f"tied {tied}"
        if layout.is_main:
            write_tiny_model(path, tied)
        dist.barrier()
        for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 5e-3)):
            fused = gradients(path, dtype, layout, num_marked=1)
            heads.linear_logprob = through_autograd  # type: ignore[assignment]
            plain = gradients(path, dtype, layout, num_marked=0)
            heads.linear_logprob = linear_logprob
            made = optimizer.DistributedDataParallelConfig
            optimizer.DistributedDataParallelConfig = partial(with_overlap, made)  # type: ignore[assignment, misc]
            overlapped = gradients(path, dtype, layout, num_marked=1)
            optimizer.DistributedDataParallelConfig = made  # type: ignore[misc]
            for name, wanted in plain.items():
                error = float((fused[name] - wanted).norm() / wanted.norm())
                assert error <= tolerance, f"tied {tied}, {dtype}, {name}: off by {error:.1e}"
                # Not equal in all bits, because sums over processes have another order.
                torch.testing.assert_close(overlapped[name], fused[name], rtol=1e-5, atol=1e-7)
    if layout.is_main:
        print("passed")
    dist.destroy_process_group()


def through_autograd(*inputs: Tensor, accumulate_main_grad: bool, **options: Any) -> tuple[Tensor, ...]:
    assert accumulate_main_grad
    return linear_logprob(*inputs, **options)  # type: ignore[return-value]


def with_overlap(make: Any, **settings: Any) -> Any:
    return make(**settings | {"overlap_grad_reduce": True})


def gradients(path: Path, dtype: str, layout: ParallelLayout, num_marked: int) -> dict[str, Tensor]:
    """Returns the gradients of two passes over several micro-batches; the second pass starts from zeroed buffers."""
    architecture = read_architecture(path)
    model = TrainableModel(
        "model",
        architecture,
        LogprobHead(layout, architecture.vocab_size),
        ModelConfig(path=path, dtype=dtype),  # type: ignore[arg-type]
        layout,
        TrainableConfig(optimizer=OptimizerConfig(lr=1e-2, clip_grad=0.0)),
    )
    model.load_weights(path)
    for _, parameter in model.parameters():
        assert parameter.main_grad.dtype is torch.float32  # type: ignore[attr-defined]
    for chunk in model._training.chunks:  # type: ignore[union-attr]
        if chunk.ddp_config.overlap_grad_reduce:
            chunk.config.no_sync_func = chunk.no_sync  # only the last micro-batch starts the reductions
    plan = PackingPlan(layout.data_rank, layout.data_size, microbatch_tokens=48, device=layout.device)
    for _ in range(2):
        batch = pack(SEQUENCES, plan)
        assert len(batch.microbatches) > 1
        model.accumulate_gradients(batch, weighted_loss)
    marked = [parameter for _, parameter in model.parameters() if parameter.grad_added_to_main_grad]  # type: ignore[attr-defined]
    assert len(marked) == num_marked
    return {name: parameter.main_grad.clone() for name, parameter in model.parameters()}  # type: ignore[attr-defined]


def weighted_loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
    loss = -(outputs.values * microbatch.advantages)[microbatch.loss_mask].sum() / 100
    return LossOutput(loss, {"loss": loss.detach()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
