"""Nothing inside a micro-batch asks the device for a number: on a GPU that would empty its queue."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_oreal.config import ModelConfig, ParallelConfig
from megatron_oreal.models import parallel
from megatron_oreal.parallel.layout import ParallelLayout
from tests.support.tiny_models import write_tiny_model
from tests.support.updates import passes_over_microbatches

aten = torch.ops.aten
# Each has a result, or a shape of one, that the host must wait for.
WAITING = {
    aten._local_scalar_dense.default,  # item(), int(), bool()
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
# Of linear_logprob: two functions that look at numbers on a CPU only. padded_batches has tensors of the host only.
ON_THE_HOST = {"check_inputs", "common_factor", "padded_batches"}


class RefusesToWait(TorchDispatchMode):
    """Raises AssertionError at an operation that would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if (func in WAITING or by_mask) and not ON_THE_HOST & set(names_of_callers()):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def names_of_callers() -> Iterator[str]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]


@pytest.fixture(scope="module")
def layout() -> Iterator[ParallelLayout]:
    yield parallel.initialize(ParallelConfig(), seed=0)
    parallel.finalize()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_no_microbatch_waits_for_the_device(layout: ParallelLayout, tmp_path: Path, tied: bool, recompute: Any) -> None:
    path = write_tiny_model(tmp_path, tied, num_layers=2)
    settings = ModelConfig(path=path, recompute=recompute)
    for run in passes_over_microbatches(path, layout, settings).values():
        with RefusesToWait():
            run()


def test_what_waits_is_noticed() -> None:
    values, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    for wait in (
        lambda: values.sum().item(),
        lambda: int(values[1]),
        lambda: bool(mask.any()),
        lambda: values[mask],
        lambda: values.index_put((mask,), torch.tensor(1.0)),
        lambda: mask.nonzero(),
        lambda: values.masked_select(mask),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), RefusesToWait():
            wait()
    with RefusesToWait():
        values.index_select(0, torch.tensor([2])), values[torch.tensor([2])], torch.where(mask, values, 0.0).sum()
