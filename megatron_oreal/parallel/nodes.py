"""Tells on which node of the job this process runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True, frozen=True)
class Node:
    """The place of one trainer process in the job."""

    index: int
    num_nodes: int
    num_ranks: int  # trainer processes on each node
    local_rank: int


def this_node(environment: Mapping[str, str] = os.environ) -> Node:
    """Reads torchrun's variables. Raises ValueError when the nodes have different numbers of processes."""
    rank, local_rank = int(environment.get("RANK", "0")), int(environment.get("LOCAL_RANK", "0"))
    world_size, num_ranks = int(environment.get("WORLD_SIZE", "1")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    index = int(environment.get("GROUP_RANK", rank // num_ranks))
    if world_size % num_ranks or rank != index * num_ranks + local_rank:
        raise ValueError(
            "rollout.sglang.placement=colocated needs equally many processes on each node, numbered node by node: "
            f"rank {rank} of {world_size} is process {local_rank} of {num_ranks} on node {index}"
        )
    return Node(index, world_size // num_ranks, num_ranks, local_rank)
