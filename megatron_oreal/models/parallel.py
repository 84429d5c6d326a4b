"""Defines the parallel layout and the backend of this process. Both are chosen once, before anything is built.

On CUDA, the group of all processes has two backends: NCCL for tensors on GPUs, and gloo for Python objects and tensors
on the host. Megatron's more than twenty groups use NCCL alone, because gloo would open a mesh of sockets for each of
them.
"""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_oreal.config import ParallelConfig
from megatron_oreal.models import megatron_on_cpu
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.parallel.rendezvous import rendezvous, stay_on_loopback

ON_CUDA = "cpu:gloo,cuda:nccl"  # backends of the group of all processes


def initialize(
    parallel: ParallelConfig,
    seed: int,
    deterministic: bool | Literal["auto"] = "auto",
    has_servers_elsewhere: bool = False,
) -> ParallelLayout:
    """Starts torch.distributed (a world of one without a launcher) and Megatron's process groups.

    `deterministic`: whether updates are reproducible; "auto" is True on a CPU, where it costs little, and False on
    CUDA. `has_servers_elsewhere`: whether NCCL may have to reach nodes without ranks. Raises ValueError if the
    launcher's number of processes does not fit the layout.
    """
    quiet_megatron()
    on_cpu = megatron_on_cpu.enable()
    if deterministic == "auto":
        deterministic = on_cpu
    if not on_cpu and parallel.context > 1:
        raise ValueError("parallel.context > 1 runs on a CPU only so far: set parallel.context=1")
    if not on_cpu:
        set_cuda_environment(parallel, deterministic)
    from megatron.core import parallel_state, tensor_parallel

    device = torch.device("cpu") if on_cpu else local_cuda_device()
    if not on_cpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    if not dist.is_initialized():
        # With the device, NCCL connects here and derives the smaller groups from this one.
        backend: dict[str, Any] = {"backend": "gloo"} if on_cpu else {"backend": ON_CUDA, "device_id": device}
        stay_on_loopback(has_servers_elsewhere)
        dist.init_process_group(**backend, timeout=timeout, **rendezvous(timeout))
    with megatron_groups("gloo" if on_cpu else "nccl"):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            distributed_timeout_minutes=max(1, parallel.timeout_seconds // 60),
            create_gloo_process_groups=False,
        )
    layout = ParallelLayout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=parallel.tensor,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        virtual_size=parallel.virtual_pipeline or 1,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        sequence_parallel=parallel.sequence,
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        deterministic_updates=deterministic and not on_cpu,
        context_rank=parallel_state.get_context_parallel_rank(),
        context_size=parallel.context,
        context_group=parallel_state.get_context_parallel_group() if parallel.context > 1 else None,
    )
    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if deterministic:
        torch.backends.cudnn.benchmark = False
        # All memory is written before it is read
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if deterministic and on_cpu:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return layout


def set_cuda_environment(parallel: ParallelConfig, deterministic: bool) -> None:
    """Sets variables that CUDA's libraries read at their start. Values that the user has set stay.

    `PYTORCH_CUDA_ALLOC_CONF` must be set before torch is imported: see use_expandable_segments of launch.py.
    """
    if parallel.tensor > 1:
        # One hardware queue makes a gradient's all-reduce start before the product that hides it, as Megatron intends.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # for Transformer Engine's attention


@contextmanager
def megatron_groups(backend: str) -> Iterator[None]:
    """Makes this backend the default of Megatron's groups inside the block, instead of those of the world group."""
    from megatron.core import parallel_state

    create_group = parallel_state.create_group

    def create_with_backend(*args: Any, **kwargs: Any) -> Any:
        return create_group(*args, **{**kwargs, "backend": kwargs.get("backend") or backend})

    parallel_state.create_group = create_with_backend
    try:
        yield
    finally:
        parallel_state.create_group = create_group


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Makes torch use only deterministic algorithms inside the block; it raises RuntimeError if there is none.

    A warning (warn_only) would not suffice, because the backward passes of fused attention then stay nondeterministic.
    """
    if not enabled:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def local_cuda_device() -> torch.device:
    """Returns the local rank's GPU, or number 0 if the process sees only one GPU."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def finalize() -> None:
    if dist.is_initialized():
        destroy_groups()
        dist.destroy_process_group()


def destroy_groups() -> None:
    """Destroys all groups but the world. Megatron only drops its references, which leaves threads and sockets."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def quiet_megatron() -> None:
    """Suppresses Megatron's warnings about missing optional packages, which every process would repeat."""
    warnings.filterwarnings("ignore", module="megatron.*")
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
