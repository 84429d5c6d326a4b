"""Colocated servers of several nodes: who starts which, and what one node's failure is to the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import ServerError
from megatron_oreal.engines.sglang.servers.colocated import on_node, open_colocated_servers, trainer_ranks
from megatron_oreal.engines.sglang.servers.process import ServerSettings
from megatron_oreal.parallel.collectives import run_on_all
from megatron_oreal.parallel.nodes import Node, this_node


def environment(rank: int, world_size: int, local_rank: int, local_world_size: int, **others: int) -> dict[str, str]:
    values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_world_size}
    return {name: str(value) for name, value in (values | others).items()}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Node(index=0, num_nodes=1, num_ranks=1, local_rank=0)),
        (environment(3, 4, 3, 4, GROUP_RANK=0), Node(0, 1, 4, 3)),
        (environment(127, 128, 7, 8), Node(15, 16, 8, 7)),  # as srun numbers
        (environment(1, 2, 0, 1, GROUP_RANK=1), Node(1, 2, 1, 0)),
    ],
)
def test_where_a_process_is(variables: dict[str, str], expected: Node) -> None:
    assert this_node(variables) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (environment(9, 12, 1, 8), "rank 9 of 12 is process 1 of 8 on node 1"),
        (environment(1, 16, 0, 8), "rank 1 of 16 is process 0 of 8 on node 0"),  # srun --distribution=cyclic
        (environment(8, 16, 0, 8, GROUP_RANK=2), "rank 8 of 16 is process 0 of 8 on node 2"),
    ],
)
def test_nodes_that_differ_are_refused(variables: dict[str, str], message: str) -> None:
    expected = "rollout.sglang.placement=colocated needs equally many processes on each node, numbered node by node: "
    with pytest.raises(ValueError) as caught:
        this_node(variables)
    assert str(caught.value) == expected + message


@pytest.mark.parametrize(
    ("settings", "num_ranks", "expected"),
    [
        ({"num_servers": 2, "tensor": 2}, 4, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"num_servers": 1, "tensor": 2}, 8, [[0, 1], [8, 9]]),
        ({"num_servers": 2, "tensor": 2, "gpus": [3, 2, 1, 0]}, 4, [[3, 2], [1, 0], [7, 6], [5, 4]]),
        ({"num_servers": 2}, 1, [[0], [0], [1], [1]]),  # on a CPU
    ],
)
def test_a_server_gets_weights_of_its_own_gpus(
    settings: dict[str, object], num_ranks: int, expected: list[list[int]]
) -> None:
    config = SglangConfig(placement="colocated", **settings)
    node = Node(index=0, num_nodes=2, num_ranks=num_ranks, local_rank=0)
    assert [trainer_ranks(config, server, node) for server in range(len(expected))] == expected


def settings_of(config: SglangConfig, folder: Path) -> ServerSettings:
    return ServerSettings(config, folder, "float32", folder, "cpu", context_length=16)


def test_servers_listen_where_the_first_node_reaches_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback leads to loopback: here all nodes are this one."""
    one, second_of_two = Node(0, 1, 8, 0), Node(1, 2, 8, 0)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.3")
    settings = settings_of(SglangConfig(placement="colocated"), tmp_path)
    assert on_node(settings, one) == settings
    host = on_node(settings, second_of_two).config.host
    assert host.startswith("127.0.0.")
    monkeypatch.setenv("MASTER_ADDR", "::1")
    assert on_node(settings, second_of_two).config.host == "::1"
    named = settings_of(SglangConfig(placement="colocated", host="192.0.2.1"), tmp_path)
    assert on_node(named, one) == named
    with pytest.raises(ValueError, match=r"^rollout\.sglang\.host=192\.0\.2\.1 is one address.*: drop rollout"):
        on_node(named, second_of_two)


def fail_on_one_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)

    def failing() -> None:
        if rank == 1:
            raise ServerError("SGLang server 1 has ended")

    assert run_on_all(lambda: [rank], ServerError) == [[0], [1]]
    with pytest.raises(ServerError, match=r"^SGLang server 1 has ended$"):
        run_on_all(failing, ServerError)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(rank, 2, rank, 2).items():
            patch.setenv(name, value)
        config = SglangConfig(placement="colocated", python=Path("none") if rank == 0 else Path("never run"))
        with pytest.raises(ValueError, match=r"^rollout\.sglang\.python: none cannot be run"):
            with open_colocated_servers(settings_of(config, Path(folder)), print):
                pass
    dist.destroy_process_group()


def test_what_one_rank_meets_is_raised_on_all(tmp_path: Path) -> None:
    mp.spawn(fail_on_one_rank, args=(str(tmp_path),), nprocs=2)
