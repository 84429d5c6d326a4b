"""One process: with gradient-accumulation fusion the head writes into Megatron's main_grad, else all is as without."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import random_sequences, write_tiny_model
from torch import Tensor
from transformers.utils import logging as transformers_logging

from megatron_oreal.checkpoint.families import read_architecture
from megatron_oreal.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainableConfig
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.models import parallel
from megatron_oreal.models.heads import LogprobHead
from megatron_oreal.models.parallel import ParallelLayout
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.types import LossOutput, Microbatch, TokenOutputs

SEQUENCES = random_sequences(7)


def main(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    layout = parallel.initialize(ParallelConfig(), seed=0)
    for tied in (False, True):
        path = write_tiny_model(folder / f"tied {tied}", tied)
        for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-2)):
            plain, fused = (gradients(path, dtype, fusion, layout) for fusion in (False, True))
            for name, wanted in plain.items():
                error = float((fused[name] - wanted).norm() / wanted.norm())
                assert error <= tolerance, f"tied {tied}, {dtype}, {name}: off by {error:.1e}"
    print("passed")
    dist.destroy_process_group()


def gradients(path: Path, dtype: str, fusion: bool, layout: ParallelLayout) -> dict[str, Tensor]:
    """Of two passes over several micro-batches: the second starts from zeroed buffers."""
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
    # Megatron's own layers have read it, and need CUDA extensions for it.
    for _, parameter in model.parameters():
        assert parameter.main_grad.dtype is torch.float32  # type: ignore[attr-defined]
    for chunk in model.chunks:
        chunk.config.gradient_accumulation_fusion = fusion
    plan = PackingPlan(0, 1, microbatch_tokens=48, device=layout.device)
    for _ in range(2):
        batch = pack(SEQUENCES, plan)
        assert len(batch.microbatches) > 1
        model.accumulate_gradients(batch, weighted_loss)
    heads = [parameter for _, parameter in model.parameters() if parameter.grad_added_to_main_grad]  # type: ignore[attr-defined]
    assert len(heads) == fusion
    return {name: parameter.main_grad.clone() for name, parameter in model.parameters()}  # type: ignore[attr-defined]


def weighted_loss(outputs: TokenOutputs, microbatch: Microbatch) -> LossOutput:
    loss = -(outputs.values * microbatch.advantages)[microbatch.loss_mask].sum() / 100
    return LossOutput(loss, {"loss": loss.detach()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
