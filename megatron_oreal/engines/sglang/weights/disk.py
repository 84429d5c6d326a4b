"""Sends weights through a Hugging Face directory, on a disk that the trainer and the servers share."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from megatron_oreal.engines.sglang.client import EventLoopThread, SglangClient
from megatron_oreal.engines.sglang.weights.requests import Deadline, WeightSyncError
from megatron_oreal.engines.sglang.weights.transport import ServerTransport, raise_push_failure
from megatron_oreal.parallel.collectives import wait_for_all_ranks
from megatron_oreal.weights.hf_directory import save_hf

# The directory of a version, and the names that `temporary_directory` gives it before completion and after replacement.
OWN_NAMES = re.compile(r"version_\d{6,}|\.version_\d{6,}\.(\d+\.)?[0-9a-f]{8}(\.old)?\.tmp")


class DiskTransport(ServerTransport):
    """The first rank writes the directory; every rank asks its servers to read it."""

    def __init__(
        self,
        loop: EventLoopThread,
        timeout_seconds: float,
        folder: Path,
        model_path: Path,
        is_main: bool,
        check_weights: bool = False,
    ) -> None:
        """`folder`: RUN_DIR/weights; `model_path`: has config.json; `is_main`: whether this is the first rank."""
        super().__init__(loop, timeout_seconds, check_weights)
        self.folder, self.model_path, self.is_main = folder.resolve(), model_path, is_main

    def send(
        self, tensors: Iterator[tuple[str, Tensor]], version: int, clients: Sequence[SglangClient], deadline: Deadline
    ) -> None:
        path = self.folder / f"version_{version:06d}"
        failure = None
        try:
            save_hf(tensors, self.model_path, self.model_path, path, self.is_main)
        except (OSError, SafetensorError) as error:
            failure = WeightSyncError(f"{path} cannot be written: {error}", [])
        raise_push_failure(failure)
        body = {"model_path": str(path), "weight_version": self.label(version), "flush_cache": True}
        try:
            self.post("/update_weights_from_disk", dict.fromkeys(clients, body), deadline).answers()
        finally:
            wait_for_all_ranks()  # waits until all servers have read
        if self.is_main:
            self.remove_others(path)

    def remove_others(self, kept: Path) -> None:
        """Removes older directories, and incomplete ones of a killed trainer, but no files of the user."""
        for path in self.folder.iterdir():
            if path != kept and OWN_NAMES.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
