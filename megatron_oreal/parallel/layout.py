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
    data_rank: int  # of this rank's batch: context-parallel ranks share one
    data_size: int
    sequence_parallel: bool
    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    # Updates use torch's deterministic algorithms; on a CPU all code does, see models/parallel.py.
    deterministic_updates: bool = False
    # Context-parallel ranks share each sequence's tokens; their weights are copies, as those of replicas are.
    context_rank: int = 0
    context_size: int = 1
    context_group: dist.ProcessGroup | None = None  # None without context parallelism

    @property
    def is_main(self) -> bool:
        """Returns whether this is the first rank, which writes files and sends requests to servers."""
        return self.rank == 0

    @property
    def copy_rank(self) -> int:
        """This rank among those with the same shards of the weights, over which gradients are summed."""
        return self.data_rank * self.context_size + self.context_rank

    @property
    def num_copies(self) -> int:
        """How many ranks have this rank's shards of the weights; a sharded optimizer is split over them."""
        return self.data_size * self.context_size

    @property
    def last_stage_rank(self) -> int:
        """Returns the global rank of this pipeline's last stage."""
        return dist.get_global_rank(self.pipeline_group, self.pipeline_size - 1)
