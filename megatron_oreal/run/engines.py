"""Opens the engine of a run, sends it the policy's weights, and shares devices between trainer and servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist

from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig
from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.engines.local.engine import LocalEngine
from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.endpoints import in_use
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.engines.sglang.servers.colocated import open_colocated_servers, trainer_ranks
from megatron_oreal.engines.sglang.servers.fleet import open_servers
from megatron_oreal.engines.sglang.servers.process import DeviceType, ServerSettings
from megatron_oreal.engines.sglang.weights.disk import DiskTransport
from megatron_oreal.engines.sglang.weights.distributed import DistributedTransport
from megatron_oreal.engines.sglang.weights.shared_memory import RanksOf, TensorTransport
from megatron_oreal.engines.sglang.weights.transport import WeightTransport
from megatron_oreal.engines.stop_strings import Decode
from megatron_oreal.models.build import DTYPES, resolved_for
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.parallel.nodes import this_node
from megatron_oreal.rollout.recording import ReplayEngine
from megatron_oreal.types import Notify
from megatron_oreal.weights.torch_dist_reader import is_torch_dist

AnyConfig = TrainConfig | SftConfig | EvalRunConfig


@contextmanager
def open_engine(
    config: AnyConfig, layout: ParallelLayout, notify: Notify, decode: Decode | None = None
) -> Iterator[RolloutEngine]:
    """Opens the engine of `rollout.engine`, or the one that replays the responses of `rollout.replay`.

    The end of the block closes the engine and the servers that it started.

    decode: lets the engine end responses at `rollout.stop_strings`. Without it the sampler cuts them afterwards.

    Raises ValueError for servers that the settings do not allow, and ServerError for servers that do not start.
    """
    with ExitStack() as stack:
        engine: RolloutEngine
        if config.rollout.replay is not None:
            engine = ReplayEngine(config.rollout.replay, window=config.rollout.staleness + 1)
        elif config.rollout.engine == "local":
            group = dist.group.WORLD if layout.world_size > 1 else None
            dtype = DTYPES[config.model.dtype]
            engine = LocalEngine(config.model.path, layout.device, dtype, config.rollout.batch_size, group, decode)
        else:
            engine = sglang_engine(config, layout, notify, stack, decode)
        stack.callback(engine.close)
        yield engine


def sglang_engine(
    config: AnyConfig, layout: ParallelLayout, notify: Notify, stack: ExitStack, decode: Decode | None = None
) -> SglangEngine:
    """Opens the SGLang engine. The first rank speaks to the servers, and the other ranks help to send weights.

    The first rank also starts the servers, except colocated servers, which each node starts itself.
    """
    settings = server_settings(config, layout.device)
    servers, fleet = settings.config, None
    if servers.placement == "colocated":
        fleet = stack.enter_context(open_colocated_servers(settings, notify))
    elif layout.is_main:
        if servers.endpoints_file is not None and servers.endpoints_file.is_file():
            stack.enter_context(in_use(servers.endpoints_file, is_shared=isinstance(config, EvalRunConfig)))
        fleet = stack.enter_context(open_servers(settings, notify))
    thread = EventLoopThread("sglang")

    def ranks_of(client: SglangClient) -> Sequence[int]:
        index = next(server.index for server in engine.pool.servers if server.client is client)
        return trainer_ranks(servers, index, this_node())

    transport = weight_transport(config, layout, thread, ranks_of)
    endpoints = fleet.endpoints if fleet is not None else []
    router = fleet.router.endpoint if fleet is not None and fleet.router is not None else None
    engine = SglangEngine(
        servers, config.model.path, endpoints, transport, thread, fleet, notify, router, rank=layout.rank, decode=decode
    )
    if isinstance(config, EvalRunConfig):
        engine.check_unchanged()
    return engine


def server_settings(config: AnyConfig, device: torch.device) -> ServerSettings:
    """Returns the settings that the run's servers share. They look for the tokenizer beside the model by default.

    Raises ValueError for a model that servers cannot read.
    """
    if is_torch_dist(config.model.path):
        raise ValueError(
            f"model.path: SGLang reads Hugging Face directories, {config.model.path} is a torch_dist checkpoint: "
            "convert it with megatron-oreal convert mcore2hf"
        )
    servers, model = config.rollout.sglang, config.model
    if model.tokenizer is not None:
        flags = {"tokenizer-path": str(model.tokenizer.resolve())} | servers.flags
        servers = servers.model_copy(update={"flags": flags})
    device_type: DeviceType = "cuda" if device.type == "cuda" else "cpu"
    context_length = config.rollout.longest_sequence(config.data.max_prompt_tokens)
    dtype = resolved_for(model, device).dtype
    return ServerSettings(servers, model.path, dtype, config.run_dir, device_type, context_length)


def weight_transport(
    config: AnyConfig, layout: ParallelLayout, thread: EventLoopThread, ranks_of: RanksOf
) -> WeightTransport:
    servers = config.rollout.sglang
    seconds, checks = servers.weight_timeout_seconds, servers.check_weights
    if servers.weight_transport == "disk":
        folder = config.run_dir / "weights"
        return DiskTransport(thread, seconds, folder, config.model.path, layout.is_main, checks)
    if servers.weight_transport == "distributed":
        if servers.placement == "colocated" and layout.device.type == "cuda":
            raise ValueError(
                "rollout.sglang.weight_transport=distributed: NCCL has no two members on one GPU; with "
                "placement=colocated set tensor, or disk"
            )
        return DistributedTransport(thread, seconds, servers.bucket_bytes, layout.device, checks)

    return TensorTransport(thread, seconds, servers.bucket_bytes, ranks_of, checks)
