"""Saves a run's checkpoints and restores the newest one. A checkpoint holds everything that the next step depends on.

    RUN_DIR/checkpoints/step_000050/
        run.json                                   step, parallel layout, prompt cursor, evaluation
        random_t00_p00.pt                          random states
        policy/parameters_t00_p00.safetensors      a tensor and pipeline rank's parameters, by Megatron's global names
        policy/optimizer_t00_p00_d000.pt           optimizer (with float32 master weights) and schedule
        reward_model/...

A checkpoint is written under a temporary name and renamed when every rank's files are on disk, so a folder with its
final name is complete. Only a run with the layout that wrote it can read it; see README.md in this folder.
"""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megatron_oreal.config import CheckpointConfig
from megatron_oreal.data.prompts import CursorState
from megatron_oreal.observability.files import save_tensors, sync_file, sync_folder
from megatron_oreal.observability.full_disk import WAY_OUT, is_full_disk
from megatron_oreal.parallel.collectives import broadcast_object, raise_on_all, wait_for_all_ranks
from megatron_oreal.parallel.layout import ParallelLayout

STEP_FOLDER = re.compile(r"step_(\d{6,})")
UNFINISHED = re.compile(r"\.step_\d{6,}(\.old)?\.tmp")  # A killed run leaves folders of these names.
# A full disk raises one of these: Python, torch and safetensors differ.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
# Reading a damaged file raises one of these.
READ_ERRORS = (*WRITE_ERRORS, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError)


class Trainable(Protocol):
    """The part of models.trainable.TrainableModel that a checkpoint saves."""

    @property
    def optimizer_is_sharded(self) -> bool: ...
    def parameters(self) -> list[tuple[str, Tensor]]: ...
    def training_state(self) -> dict[str, Any]: ...
    def load_training_state(self, state: dict[str, Any]) -> None: ...


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(slots=True)
class Progress:
    """The state of a run besides its tensors: its step, its position in the data, its evaluation."""

    step: int
    cursor: CursorState
    num_skipped_steps: int = 0  # without any group to train on
    evaluation: dict[str, float] = field(default_factory=dict)  # Scores of this step's policy, if evaluated.


@dataclass(slots=True)
class TrainState:
    folder: Path  # RUN_DIR/checkpoints
    models: Mapping[str, Trainable]
    layout: ParallelLayout
    config: CheckpointConfig

    def save(self, progress: Progress) -> Path:
        """Collective. Writes step_<step>, then removes the checkpoints that need not be kept.

        Raises CheckpointError on every rank when any rank's files cannot be written.
        """
        final = self.folder / f"step_{progress.step:06d}"
        temporary = self.folder / f".{final.name}.tmp"
        if self.layout.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(temporary)
            temporary.mkdir()
        wait_for_all_ranks()  # until the temporary folder exists
        failure: CheckpointError | None = None
        try:
            self._write(temporary, progress)
        except WRITE_ERRORS as error:
            failure = CheckpointError(f"checkpoint {final} could not be written: {self._what_stays(error)}")
        try:
            raise_on_all(failure)
        except CheckpointError:
            if self.layout.is_main:
                remove(temporary)
            raise
        try:
            if self.layout.is_main:
                if final.is_symlink() or not final.is_file():  # a file of this name is not ours: renaming fails
                    remove(final)
                temporary.rename(final)
                sync_folder(self.folder)
                self._prune()
        except OSError as error:
            failure = CheckpointError(f"checkpoint {final} could not be put in its place ({describe(error)})")
        raise_on_all(failure)
        return final

    def _what_stays(self, error: Exception) -> str:
        """Says why a checkpoint was not written, and where the run is when it starts again."""
        reason = WAY_OUT if is_full_disk(error) else describe(error)
        steps = saved_steps(self.folder)
        return f"{reason}; the run then " + (f"goes on after step {steps[-1]}" if steps else "begins again")

    def load_latest(self) -> Progress | None:
        """Collective. Restores the newest checkpoint and returns where the run stood; None when there is no checkpoint.

        Raises ValueError on every rank when another layout wrote the checkpoint or when any rank's files are damaged.
        """
        if self.layout.is_main:
            for stale in self.folder.glob(".step_*.tmp"):
                if UNFINISHED.fullmatch(stale.name):
                    remove(stale)
        # The first rank's view counts: a shared folder may show the other nodes an older state.
        steps = broadcast_object(saved_steps(self.folder))
        if not steps:
            return None
        folder = self.folder / f"step_{steps[-1]:06d}"
        layout, progress = self._layout_sizes(), None
        failure: ValueError | None = None
        try:
            saved = json.loads((folder / "run.json").read_text())
            layout = saved["layout"]
            if layout == self._layout_sizes():
                progress = Progress(**saved["progress"])
                self._read(folder)
        except torch.OutOfMemoryError:
            raise  # it is a RuntimeError too, but says nothing about the files
        except READ_ERRORS as error:
            before = f"resume from {folder.with_name(f'step_{steps[-2]:06d}')}" if steps[:-1] else "start again"
            failure = ValueError(f"run_dir: checkpoint {folder} is damaged ({describe(error)}); remove it to {before}")
        raise_on_all(failure)
        if progress is None:
            raise ValueError(
                f"parallel: {folder} was written with {layout}, this run has {self._layout_sizes()}; "
                "resume with the same layout, or start a new run_dir from the exported weights"
            )
        return progress

    def _read(self, folder: Path) -> None:
        for name, model in self.models.items():
            load_parameters_in_place(model, folder / name / f"parameters_{self._shard}.safetensors")
            model.load_training_state(load_on_cpu(folder / name / self._optimizer_file(model)))
        restore_random_state(load_on_cpu(folder / f"random_{self._shard}.pt"))

    def _write(self, folder: Path, progress: Progress) -> None:
        for name, model in self.models.items():
            (folder / name).mkdir(exist_ok=True)
            if self.layout.copy_rank == 0:
                parameters = {key: value.detach().cpu().contiguous() for key, value in model.parameters()}
                write_and_sync(folder / name / f"parameters_{self._shard}.safetensors", parameters, save_tensors)
            if self.layout.copy_rank == 0 or model.optimizer_is_sharded:
                write_and_sync(folder / name / self._optimizer_file(model), model.training_state(), torch_save)
        if self.layout.copy_rank == 0:
            write_and_sync(folder / f"random_{self._shard}.pt", random_state(), torch_save)
        if self.layout.is_main:
            record = {"layout": self._layout_sizes(), "progress": asdict(progress)}
            (folder / "run.json").write_text(json.dumps(record, indent=2))
            sync_file(folder / "run.json")
        for name in self.models:
            sync_folder(folder / name)  # the names of the files, not only their contents
        sync_folder(folder)

    def _prune(self) -> None:
        steps = saved_steps(self.folder)
        kept = {*steps[-self.config.keep_last :], *self._best(steps)}
        for step in steps:
            if step not in kept:
                doomed = self.folder / f".step_{step:06d}.old.tmp"
                (self.folder / f"step_{step:06d}").rename(doomed)
                remove(doomed)

    def _best(self, steps: list[int]) -> list[int]:
        scores = {}
        for step in steps if self.config.best_metric else []:
            evaluation = json.loads((self.folder / f"step_{step:06d}" / "run.json").read_text())["progress"][
                "evaluation"
            ]
            if self.config.best_metric in evaluation:
                scores[step] = evaluation[self.config.best_metric]
        return sorted(scores, key=lambda step: (-scores[step], step))[: self.config.keep_best]

    @property
    def _shard(self) -> str:
        return f"t{self.layout.tensor_rank:02d}_p{self.layout.pipeline_rank:02d}"

    def _optimizer_file(self, model: Trainable) -> str:
        return f"optimizer_{self._shard}_d{self.layout.copy_rank if model.optimizer_is_sharded else 0:03d}.pt"

    def _layout_sizes(self) -> dict[str, int]:
        layout = self.layout
        sharded = any(model.optimizer_is_sharded for model in self.models.values())
        return {
            "tensor": layout.tensor_size,
            "pipeline": layout.pipeline_size,
            "virtual_pipeline": layout.virtual_size,
            "data": layout.num_copies if sharded else 0,  # 0: any number of replicas can read it
        }


def remove(path: Path) -> None:
    """Removes a folder and what is in it, or a file; of a link, only the link itself. It may be gone already."""
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def saved_steps(folder: Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, oldest first."""
    matches = [STEP_FOLDER.fullmatch(path.name) for path in folder.glob("step_*")]
    return sorted(int(match[1]) for match in matches if match)


def load_on_cpu(file: Path) -> Any:
    """Loads a file mapped into memory: replicas that read it share its pages, and no GPU holds a second copy."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=True)


def describe(error: Exception) -> str:
    """Returns the error's type and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def write_and_sync(file: Path, content: Any, write: Any) -> None:
    write(content, file)
    sync_file(file)


def torch_save(content: Any, file: Path) -> None:
    torch.save(content, file)


def load_parameters_in_place(model: Trainable, file: Path) -> None:
    saved = load_file(file)
    with torch.no_grad():
        for name, parameter in model.parameters():
            parameter.copy_(saved[name])


def random_state() -> dict[str, Any]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, internal, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(internal), gauss]}
    state["tracker"] = dict(get_cuda_rng_tracker().get_states())
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
