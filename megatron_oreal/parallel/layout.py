"""The parallel layout of a run, as one rank sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class ParallelLayout:
    """The ranks, sizes and process groups of one rank. Functions take it and never ask Megatron's global state."""

    rank: int
    world_size: int
    tensor_rank: int
    tensor_size: int
    pipeline_rank: int
    pipeline_size: int
    virtual_size: int  # model chunks on this rank
    data_rank: int
    data_size: int
    sequence_parallel: bool
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    # Updates use torch's deterministic algorithms; on a CPU all code does, see models/parallel.py.
    deterministic_updates: bool = False

    @property
    def is_main(self) -> bool:
        """Returns whether this is the first rank, which writes files and sends requests to servers."""
        return self.rank == 0

    @property
    def last_stage_rank(self) -> int:
        """Returns the global rank of this pipeline's last stage."""
        return dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)
