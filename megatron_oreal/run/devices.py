"""Shares the GPUs between the trainer and colocated servers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_oreal.engines.engine import RolloutEngine
from megatron_oreal.engines.sglang.engine import SglangEngine
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.collectives import wait_for_all_ranks
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.run.engines import AnyConfig


@dataclass(slots=True)
class DeviceSharing:
    """Lets trainer and colocated servers take turns on the same devices: models are on the host while servers generate.

    Servers on a CPU keep their memory; the models go to the host all the same.
    """

    engine: SglangEngine | None  # None: trainer and servers have devices of their own
    models: Sequence[TrainableModel]
    frees_servers: bool  # whether servers release memory: on CUDA they do, on a CPU they keep it

    @contextmanager
    def training(self, pushes: bool) -> Iterator[None]:
        """Collective. Inside the block the models are on the devices.

        A block that `pushes` new weights also takes the memory of the servers' old ones.
        """
        if self.engine is None:
            yield
            return
        if self.frees_servers:
            self.engine.release_memory(["kv_cache", "weights"] if pushes else ["kv_cache"])
        wait_for_all_ranks()  # The first rank frees the devices of all ranks.
        for model in self.models:
            model.restore()
        yield
        self.generate()

    def receive(self) -> None:
        """Gives the servers the memory for weights back, before new weights arrive."""
        if self.engine is not None and self.frees_servers:
            self.engine.resume_memory(["weights"])

    def generate(self) -> None:
        """Collective. The models leave the devices to the servers, until the next `training` block."""
        if self.engine is None:
            return
        for model in self.models:
            model.offload()
        wait_for_all_ranks()  # Servers may span the devices of several ranks.
        if self.frees_servers:
            self.engine.resume_memory(["kv_cache"])


def colocated(config: AnyConfig, engine: RolloutEngine) -> SglangEngine | None:
    """Returns the engine if its servers share the trainer's devices, else None."""
    return engine if isinstance(engine, SglangEngine) and config.rollout.sglang.placement == "colocated" else None


def make_room_for_models(config: AnyConfig, layout: ParallelLayout, engine: RolloutEngine) -> None:
    """Collective, before the trainer builds its models: servers that have just started fill most of a shared GPU.

    They get their memory back in two parts: that of the weights for the first push, the rest when they generate.
    """
    servers = colocated(config, engine)
    if servers is not None and layout.device.type == "cuda":
        servers.release_memory(["kv_cache", "weights"])
        wait_for_all_ranks()  # The first rank frees the devices of all ranks.


def device_sharing(
    config: AnyConfig, layout: ParallelLayout, engine: RolloutEngine, models: Sequence[TrainableModel]
) -> DeviceSharing:
    return DeviceSharing(colocated(config, engine), models, layout.device.type == "cuda")
