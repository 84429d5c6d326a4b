"""Starts servers on the trainer's own GPUs. Each node starts its servers, and the first rank sends requests to all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import ServerError
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet, has_answered, start_servers
from megatron_oreal.engines.sglang.servers.node import address_towards
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.parallel.collectives import run_on_all
from megatron_oreal.parallel.nodes import Node, this_node
from megatron_oreal.types import Notify

DEFAULT_HOST = SglangConfig().host


def trainer_ranks(config: SglangConfig, server: int, node: Node) -> list[int]:
    """Returns, for each tensor-parallel rank of a server, the trainer's rank on the same GPU.

    server: its index among the servers of all nodes. node: any rank's node.
    """
    server_node, number = divmod(server, config.num_servers)
    gpus = config.gpus or range(config.num_servers * config.tensor)
    own = gpus[number * config.tensor : (number + 1) * config.tensor]
    # On a CPU there may be more servers than ranks.
    return [server_node * node.num_ranks + gpu % node.num_ranks for gpu in own]


@contextmanager
def open_colocated_servers(settings: ServerSettings, notify: Notify) -> Iterator[ServerFleet | None]:
    """Collective. Starts the servers of all nodes; a node's servers end with the block of its first rank.

    The first rank gets the fleet, with the servers of all nodes; it can restart those of its own node. Raises on every
    rank: ValueError for an invalid setting, ServerError for a server that does not start.
    """
    with ExitStack() as stack:
        fleets: list[ServerFleet] = []

        def start() -> list[Endpoint]:
            node = this_node()
            if node.local_rank > 0:
                return []
            first_index = node.index * settings.config.num_servers
            own = start_servers(on_node(settings, node), node.num_ranks, notify, first_index)
            fleets.append(stack.enter_context(own))
            if (num_others := node.num_nodes - 1) > 0:
                notify(f"waiting for the SGLang servers of {num_others} other node{'s' * (num_others > 1)} ...")
            return fleets[0].endpoints

        def publish() -> None:
            if is_first:
                check_reachable(elsewhere)
                fleets[0].publish(settings.run_dir / "servers.json", elsewhere)

        _, *others = run_on_all(start, ServerError)
        elsewhere, node = [*chain(*others)], this_node()
        is_first = node.index == node.local_rank == 0
        run_on_all(publish, ServerError)
        yield fleets[0] if is_first else None


def check_reachable(endpoints: Sequence[Endpoint]) -> None:
    for endpoint in endpoints:
        if not has_answered(endpoint):
            raise ServerError(
                f"SGLang server {endpoint} runs on its node, and does not answer the first one: "
                "open rollout.sglang.ports between the nodes"
            )


def on_node(settings: ServerSettings, node: Node) -> ServerSettings:
    """Returns the settings for one node. With several nodes, servers listen where the other nodes reach them."""
    if node.num_nodes == 1:
        return settings
    if settings.config.host != DEFAULT_HOST:
        raise ValueError(
            f"rollout.sglang.host={settings.config.host} is one address, the trainer has {node.num_nodes} nodes: "
            "drop rollout.sglang.host: each node takes the address that leads to the first"
        )
    host = address_towards(os.environ["MASTER_ADDR"])
    return replace(settings, config=settings.config.model_copy(update={"host": host}))
