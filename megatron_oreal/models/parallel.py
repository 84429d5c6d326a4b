"""The parallel layout of this process, and the backend it runs on: chosen once, before anything is built."""

from __future__ import annotations

import logging
import os
import random
import warnings
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_oreal.config import ParallelConfig
from megatron_oreal.models import megatron_on_cpu
from megatron_oreal.parallel.layout import ParallelLayout


def initialize(parallel: ParallelConfig, seed: int, deterministic: bool = True) -> ParallelLayout:
    """Starts torch.distributed (a world of one without a launcher) and Megatron's process groups.

    Raises ValueError where the launcher's number of processes does not fit the layout.
    """
    quiet_megatron()
    on_cpu = megatron_on_cpu.enable()
    from megatron.core import parallel_state, tensor_parallel

    device = torch.device("cpu") if on_cpu else local_cuda_device()
    if not on_cpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=parallel.timeout_seconds)
    if not dist.is_initialized():
        # What is on the CPU, all objects among it, goes by gloo: it leaves GPUs alone.
        backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, timeout=timeout, **single_process_rendezvous())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
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
    )
    random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # what is allocated is written before it is read
    return layout


def local_cuda_device() -> torch.device:
    """The local rank's GPU; a task that is shown one GPU alone has number 0."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def single_process_rendezvous() -> dict[str, Any]:
    """What init_process_group needs without a launcher: an in-process store."""
    if "RANK" in os.environ:
        return {}
    return {"store": dist.HashStore(), "rank": 0, "world_size": 1}


def finalize() -> None:
    if dist.is_initialized():
        destroy_groups()
        dist.destroy_process_group()


def destroy_groups() -> None:
    """Ends all groups but the world; Megatron only forgets its groups, whose threads and sockets would stay."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def quiet_megatron() -> None:
    """Megatron warns once per missing optional package and per process."""
    warnings.filterwarnings("ignore", module="megatron.*")
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex are not installed.*")
    logging.getLogger("megatron").setLevel(logging.ERROR)
