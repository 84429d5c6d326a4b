"""Saves a run's checkpoints while training goes on, and restores the newest one.

    RUN_DIR/checkpoints/step_000050/
        run.json                     step, layout, prompt cursor, evaluation, progress of each optimizer
        random_t00_p00.pt            random states of a tensor and pipeline rank
        policy/                      Megatron's torch_dist: parameters, master weights, moments
        reward_model/...

A checkpoint is written under a temporary name and renamed when every rank's files are on disk, so a folder with its
final name is complete. Any layout can read it; see README.md in this folder.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.storage import WriteResult

from megatron_oreal.checkpoint import rank_files
from megatron_oreal.checkpoint.pieces import OptimizerProgress, Trainable, pieces_of
from megatron_oreal.checkpoint.torch_dist_state import (
    HostCopies,
    OtherModelError,
    check_pieces,
    check_same_model,
    copy_to_host,
    finish_folder,
    read_in_place,
    read_metadata,
    write_copies,
)
from megatron_oreal.config import CheckpointConfig
from megatron_oreal.data.prompts import CursorState
from megatron_oreal.observability.files import sync_file, sync_folder
from megatron_oreal.observability.full_disk import WAY_OUT, is_full_disk
from megatron_oreal.parallel.collectives import all_gather_object, broadcast_object, gather_object, raise_on_all
from megatron_oreal.parallel.layout import ParallelLayout

STEP_FOLDER = re.compile(r"step_(\d{6,})")
UNFINISHED = re.compile(r"\.step_\d{6,}(\.old)?\.tmp")  # A killed run leaves folders of these names.
# A full disk raises one of these: Python, torch and safetensors differ.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
# Reading a damaged file raises one of these.
READ_ERRORS = (*WRITE_ERRORS, ValueError, KeyError, TypeError, AttributeError, EOFError, pickle.UnpicklingError)
Results = dict[str, list[WriteResult]]  # by model: what this rank has written


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(slots=True)
class Progress:
    """The state of a run besides its tensors: its step, its position in the data, its evaluation."""

    step: int
    cursor: CursorState
    num_skipped_steps: int = 0  # without any group to train on
    evaluation: dict[str, float] = field(default_factory=dict)  # Scores of this step's policy, if evaluated.


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    path: Path
    step: int
    seconds: float  # from the copies to the final name
    num_bytes: int  # of all ranks; known to the first one


@dataclass(slots=True)
class PendingSave:
    """A checkpoint that a thread of each rank is writing."""

    step: int
    record: dict[str, Any]  # run.json
    copies: dict[str, HostCopies]
    written: Future[Results]
    start: float  # seconds, of time.perf_counter


@dataclass(slots=True)
class TrainState:
    folder: Path  # RUN_DIR/checkpoints
    models: Mapping[str, Trainable]
    layout: ParallelLayout
    config: CheckpointConfig
    pending: PendingSave | None = None  # on all ranks or on none

    def save(self, progress: Progress) -> Path:
        """Collective. Writes step_<step> and waits for it. Raises CheckpointError as `complete` does."""
        self.begin(progress)
        saved = self.complete()
        assert saved is not None
        return saved.path

    def begin(self, progress: Progress) -> None:
        """Collective. Copies everything to the host and lets a thread write it.

        No other save may be under way. Raises CheckpointError on every rank when the disk takes no folder.
        """
        assert self.pending is None, "complete the save before"
        start = time.perf_counter()
        temporary = self._temporary(progress.step)
        failure: CheckpointError | None = None
        if self.layout.is_main:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                remove(temporary)
                for name in self.models:
                    (temporary / name).mkdir(parents=True)
            except OSError as error:
                failure = self._failure(progress.step, error)
        raise_on_all(failure)  # and wait until the temporary folder exists
        copies = {
            name: copy_to_host(list(pieces_of(model, self.layout)), self.layout.rank)
            for name, model in self.models.items()
        }
        randomness = rank_files.random_state() if self.layout.copy_rank == 0 else None
        record = {"layout": self._layout_sizes(), "progress": asdict(progress), "models": self._optimizer_progress()}
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        written = writer.submit(self._write, temporary, copies, randomness)
        writer.shutdown(wait=False)
        self.pending = PendingSave(progress.step, record, copies, written, start)

    def poll(self) -> SavedCheckpoint | None:
        """Collective. Completes the save under way if every rank has written its files, without waiting for them."""
        if self.pending is None or not all(all_gather_object(self.pending.written.done())):
            return None
        return self.complete()

    def complete(self) -> SavedCheckpoint | None:
        """Collective. Waits for the save under way and gives it its name; then drops what need not be kept.

        Raises CheckpointError on every rank when any rank's files cannot be written.
        """
        if self.pending is None:
            return None
        pending, self.pending = self.pending, None
        final, temporary = self.folder / f"step_{pending.step:06d}", self._temporary(pending.step)
        failure: CheckpointError | None = None
        results: Results = {}
        try:
            results = pending.written.result()
        except WRITE_ERRORS as error:
            failure = self._failure(pending.step, error)
        num_bytes = 0
        try:
            raise_on_all(failure)
            plans = {name: copies.plan for name, copies in pending.copies.items()}
            of_ranks = gather_object((plans, results))
            if self.layout.is_main:
                num_bytes = sum(one.size_in_bytes for _, mine in of_ranks for many in mine.values() for one in many)
                try:
                    self._finish_files(temporary, pending.record, of_ranks)
                except WRITE_ERRORS as error:
                    failure = self._failure(pending.step, error)
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
        return SavedCheckpoint(final, pending.step, time.perf_counter() - pending.start, num_bytes)

    def _write(self, temporary: Path, copies: dict[str, HostCopies], randomness: dict[str, Any] | None) -> Results:
        """Writes this rank's files, in a thread: no collective, and nothing that training changes."""
        results = {name: write_copies(temporary / name, mine) for name, mine in copies.items()}
        if randomness is not None:
            file = temporary / f"random_{rank_files.shard_name(self.layout)}.pt"
            torch.save(randomness, file)
            sync_file(file)
        for name in copies:
            sync_folder(temporary / name)  # the names of the files, not only their contents
        sync_folder(temporary)
        return results

    def _finish_files(
        self, temporary: Path, record: dict[str, Any], of_ranks: list[tuple[dict[str, Any], Results]]
    ) -> None:
        """Writes the first rank's part: what needs the plans and results of all ranks."""
        for name, model in self.models.items():
            plans, results = [plans[name] for plans, _ in of_ranks], [results[name] for _, results in of_ranks]
            finish_folder(temporary / name, plans, results, model.architecture, model.head.kind)
            sync_folder(temporary / name)
        (temporary / "run.json").write_text(json.dumps(record, indent=2))
        sync_file(temporary / "run.json")
        sync_folder(temporary)

    def _optimizer_progress(self) -> dict[str, dict[str, int]]:
        """Collective. A rank whose part of an optimizer is empty counts no steps."""
        mine = {name: asdict(model.optimizer_progress()) for name, model in self.models.items()}
        everyones = all_gather_object(mine)
        return {
            name: {key: max(theirs[name][key] for theirs in everyones) for key in counts}
            for name, counts in mine.items()
        }

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """Says why a checkpoint was not written, and where the run is when it starts again."""
        steps = saved_steps(self.folder)
        reason = WAY_OUT if is_full_disk(error) else describe(error)
        where = f"goes on after step {steps[-1]}" if steps else "begins again"
        return CheckpointError(
            f"checkpoint {self.folder / f'step_{step:06d}'} could not be written: {reason}; the run then {where}"
        )

    def load_latest(self) -> Progress | None:
        """Collective. Restores the newest checkpoint and returns where the run stood; None when there is no checkpoint.

        Raises ValueError on every rank when the checkpoint is of another model or another kind of optimizer, when it is
        of the format before and another layout wrote it, or when any rank's files are damaged.
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
        progress: Progress | None = None
        failure: ValueError | None = None
        try:
            saved = json.loads((folder / "run.json").read_text())
            progress = Progress(**saved["progress"])
            if "models" in saved:
                self._read(folder, saved)
            else:
                self._read_rank_files(folder, saved["layout"])
        except OtherModelError as error:
            failure = ValueError(str(error))
        except torch.OutOfMemoryError:
            raise  # it is a RuntimeError too, but says nothing about the files
        except READ_ERRORS as error:
            before = f"resume from {folder.with_name(f'step_{steps[-2]:06d}')}" if steps[:-1] else "start again"
            failure = ValueError(f"run_dir: checkpoint {folder} is damaged ({describe(error)}); remove it to {before}")
        raise_on_all(failure)
        return progress

    def _read(self, folder: Path, saved: dict[str, Any]) -> None:
        if saved["models"].keys() != self.models.keys():
            raise OtherModelError(
                f"run_dir: {folder} holds the models {', '.join(saved['models'])}, this run trains "
                f"{', '.join(self.models)}; choose another run_dir"
            )
        for name, model in self.models.items():
            progress = OptimizerProgress(**saved["models"][name])
            metadata = read_metadata(folder / name)
            check_same_model(folder / name, metadata, model)
            model.start_optimizer_at(progress)
            pieces = list(pieces_of(model, self.layout))
            check_pieces(folder / name, metadata, pieces)
            read_in_place(folder / name, metadata, pieces)
        mine, theirs = self._layout_sizes(), saved["layout"]
        is_same = all(mine[name] == theirs[name] for name in ("tensor", "pipeline", "virtual_pipeline"))
        shard = rank_files.shard_name(self.layout) if is_same else "t00_p00"
        rank_files.restore_random_state(rank_files.load_on_cpu(folder / f"random_{shard}.pt"), is_same_layout=is_same)

    def _read_rank_files(self, folder: Path, layout: dict[str, int]) -> None:
        mine = rank_files.old_layout_of(list(self.models.values()), self.layout)
        if layout != mine:
            raise OtherModelError(
                f"parallel: {folder} was written with {layout}, this run has {mine}; "
                "resume with the same layout, or start a new run_dir from the exported weights"
            )
        for name, model in self.models.items():
            rank_files.read_rank_files(folder / name, model, self.layout)
        file = folder / f"random_{rank_files.shard_name(self.layout)}.pt"
        rank_files.restore_random_state(rank_files.load_on_cpu(file))

    def _temporary(self, step: int) -> Path:
        return self.folder / f".step_{step:06d}.tmp"

    def _layout_sizes(self) -> dict[str, int]:
        layout = self.layout
        return {
            "tensor": layout.tensor_size,
            "pipeline": layout.pipeline_size,
            "virtual_pipeline": layout.virtual_size,
            "data": layout.num_copies,
        }

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


def describe(error: Exception) -> str:
    """Returns the error's type and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
