"""Collectives of Python objects, alone and on two ranks."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_oreal.engines.sglang.weights.requests import WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import raise_push_failure
from megatron_oreal.parallel.collectives import (
    all_gather_object,
    broadcast_object,
    is_alone,
    raise_on_all,
    run_on_all,
    wait_for_all_ranks,
)


def raising(error: Exception | None) -> str:
    if error is not None:
        raise error
    return "done"


def test_a_process_alone_needs_no_group() -> None:
    assert is_alone() and all_gather_object(3) == [3] and broadcast_object("x") == "x"
    wait_for_all_ranks()
    raise_on_all(None)
    assert run_on_all(lambda: 5) == [5]
    error = ValueError("wrong")
    with pytest.raises(ValueError, match=r"^wrong$") as raised:
        raise_on_all(error)
    assert raised.value is error


def test_an_error_keeps_its_type_or_becomes_the_one_that_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"^a setting$"):
        run_on_all(lambda: raising(ValueError("a setting")), ConnectionError)
    with pytest.raises(ConnectionError, match="No such file") as raised:
        run_on_all(lambda: raising(FileNotFoundError(2, "No such file")), ConnectionError)
    assert isinstance(raised.value.__cause__, FileNotFoundError)
    with pytest.raises(KeyError):  # an error of ours is not the user's
        run_on_all(lambda: raising(KeyError("key")))


def test_the_error_of_a_push_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(WeightSyncError("failed", ["http://a"])))
    assert str(error) == "failed" and error.urls == ["http://a"]


def on_two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    assert not is_alone() and all_gather_object([rank]) == [[0], [1]]
    assert broadcast_object({"rank": rank}, source=1) == {"rank": 1}
    wait_for_all_ranks()
    raise_on_all(None)
    for errors, message in (((None, "b"), "b"), (("a", "b"), "a"), (("a", None), "a")):
        own = errors[rank]
        with pytest.raises(ValueError, match=f"^{message}$"):
            raise_on_all(None if own is None else ValueError(own))
    with pytest.raises(WeightSyncError, match=r"^version 3: no 0; no 1$") as raised:
        raise_push_failure(WeightSyncError(f"no {rank}", [f"http://{rank}", "http://both"]), "version 3: ")
    assert raised.value.urls == ["http://0", "http://both", "http://1"]
    with pytest.raises(OSError, match=r"^full$"):
        run_on_all(lambda: raising(OSError("full") if rank == 0 else None))
    dist.destroy_process_group()


def test_two_ranks_agree_on_values_and_errors(tmp_path: Path) -> None:
    mp.spawn(on_two_ranks, args=(str(tmp_path),), nprocs=2)
