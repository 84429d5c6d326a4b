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
    """Lets trainer and colocated servers take turns on the same devices; models are on the host while servers generate.

    Servers on a CPU keep their memory, but the models still move to the host.
    """

    engine: SglangEngine | None  # None: trainer and servers have separate devices
    models: Sequence[TrainableModel]
    frees_servers: bool  # servers release memory on CUDA and keep it on a CPU

    @contextmanager
    def training(self, pushes: bool) -> Iterator[None]:
        """Collective. The models are on the devices inside the block.

        If the block `pushes` new weights, the servers also release the memory of their old weights.
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
        """Lets the servers allocate memory for weights, before new weights arrive."""
        if self.engine is not None and self.frees_servers:
            self.engine.resume_memory(["weights"])

    def generate(self) -> None:
        """Collective. Moves the models off the devices, which the servers use until the next `training` block."""
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
    """Collective. Frees GPU memory before the trainer builds its models, because new servers fill most of a shared GPU.

    The servers allocate it again in two parts: the memory of the weights for the first push, and the rest when they
    generate.
    """
    servers = colocated(config, engine)
    if servers is not None and layout.device.type == "cuda":
        servers.release_memory(["kv_cache", "weights"])
        wait_for_all_ranks()  # The first rank frees the devices of all ranks.


def device_sharing(
    config: AnyConfig, layout: ParallelLayout, engine: RolloutEngine, models: Sequence[TrainableModel]
) -> DeviceSharing:
    return DeviceSharing(colocated(config, engine), models, layout.device.type == "cuda")
