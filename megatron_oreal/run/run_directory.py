"""Decides whether a run may use a run directory, and writes there what the next start compares itself with.

RUN_DIR/config.yaml holds the settings, RUN_DIR/inputs.json the fingerprints of the files that the run began with, and
RUN_DIR/run.lock exists while a run uses the directory. A run that is refused changes nothing in the directory.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_oreal.checkpoint.train_state import saved_steps
from megatron_oreal.config import WITHOUT_INFLUENCE, ModelRunConfig, RunConfig, flatten, read_resolved, to_yaml
from megatron_oreal.observability.files import write_atomically
from megatron_oreal.parallel.collectives import raise_on_all
from megatron_oreal.run import input_files
from megatron_oreal.run.input_files import Inputs, check_inputs, fingerprint_inputs, read_inputs_file
from megatron_oreal.run.run_lock import RunLock, take_lock

CONFIG = "config.yaml"
# The addresses of a judge or a reward server may change; the requests may not.
VERIFIER_ADDRESSES = ("verifier.url", "verifier.judge.url")
# A checkpoint fits every layout; numbers differ by rounding from then on.
LAYOUT = ("parallel.tensor", "parallel.pipeline", "parallel.virtual", "parallel.sequence", "parallel.context")
# The first parts of the names of settings that may change between a run and its continuation.
CHANGEABLE = (*WITHOUT_INFLUENCE, "num_steps", "checkpoint.", "eval.", *LAYOUT)
# An evaluation may get more data sets, and may compute its summary in another way.
CHANGEABLE_IN_EVAL = (
    *WITHOUT_INFLUENCE,
    *(f"eval.{name}" for name in ("prompts.", "pass_at", "majority_at", "confidence", "num_resamples")),
)
# These say how the replicas share the optimizer and sum gradients. A checkpoint that does not fit them gives an error.
CHANGEABLE_OF_OPTIMIZERS = (".optimizer.distributed", ".optimizer.overlap_grad_reduce")
PATHS = re.compile(r"model\.path|model\.tokenizer|data\.prompts|data\.examples|algorithm\.\w+\.path|algorithm\.teacher")
EXPORTED_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# Files that may be in a folder before a run uses it: those of `serve`, and those that the user's shell writes there.
EARLY_NAMES = re.compile(
    r"servers|servers\.json|log\.txt|inputs\.json|run\.lock|.*\.(log|out|err)"
    r"|\.(config\.yaml|inputs\.json|servers\.json|run\.lock)\..*\.tmp|\.nfs.*|lost\+found"
)


@dataclass(slots=True)
class RunDirectory:
    """A run directory that this run owns until it closes."""

    path: Path
    inputs: Inputs  # empty on all ranks but the first
    notes: list[str]  # lines for the log about settings that have changed since the run began
    lock: RunLock | None = None  # only the first rank has it

    def write(self, config: ModelRunConfig) -> None:
        """Writes what the next start compares itself with. Only the first rank calls it, after all checks."""
        write_atomically(self.path / input_files.FILE, json.dumps(self.inputs, indent=1))
        write_atomically(self.path / CONFIG, to_yaml(config))


@contextmanager
def open_run_directory(
    config: ModelRunConfig, is_main: bool, changeable: tuple[str, ...] = CHANGEABLE
) -> Iterator[RunDirectory]:
    """Takes the run directory for this run alone. Collective: the first rank checks it, and all ranks raise its errors.

    Raises ValueError where another run uses the directory, or where settings or files have changed.
    """
    directory = RunDirectory(config.run_dir, {}, [])
    error: ValueError | OSError | None = None
    try:
        if is_main:
            try:
                prepare_folder(config.run_dir)
                directory.lock = take_lock(config.run_dir)
                directory.notes = check_run_dir(
                    config, changeable
                )  # Another run may have used the directory since the first check.
                before, now = read_inputs_file(config.run_dir), fingerprint_inputs(config)
                check_inputs(config.run_dir, before, now, config)
                directory.inputs = before | now
            except (ValueError, OSError) as caught:
                error = caught
        raise_on_all(error)
        yield directory
    finally:
        if directory.lock is not None:
            directory.lock.release()


def check_run_dir(config: ModelRunConfig, changeable: tuple[str, ...] = CHANGEABLE) -> list[str]:
    """Raises ValueError if a folder is not a run's, or if it belongs to a run with another configuration.

    Returns a line about the changed settings that are accepted, if there are any. The error lists the differences. A
    run that an older version began can resume: a setting that did not exist then has its default, sections are read at
    their old places, and settings without effect are not compared.
    """
    prepare_folder(config.run_dir)
    file = config.run_dir / CONFIG
    if not file.is_file():
        check_is_unused(config.run_dir)
        return []
    before, now = read_settings(file, config), flatten(yaml.safe_load(to_yaml(config)))
    idle = {setting.name for setting in config.idle_settings()}
    fingerprinted = read_inputs_file(config.run_dir)
    differences: list[str] = []
    accepted: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or name in idle:
            continue
        if may_change(name, old, new, changeable, now, fingerprinted):
            accepted.append(f"{name}: {old!r} -> {new!r}")
        else:
            differences.append(f"{name}: {old!r} -> {new!r}")
    if differences:
        raise ValueError(
            f"run_dir: {config.run_dir} belongs to another configuration ({'; '.join(differences)}); "
            f"choose another run_dir, or restore these settings to resume{reason(differences)}"
        )
    check_num_steps(config)
    return [f"settings changed since the run began: {'; '.join(accepted)}"] if accepted else []


def keep_users_files(out: Path) -> None:
    """Renames an older export that holds files or folders of the user, because a new export replaces the folder."""
    if out.is_symlink() or out.is_file() or (out.exists() and any(not is_exported(path) for path in out.iterdir())):
        number = 1
        while (kept := out.with_name(f"{out.name}.kept_{number}")).exists() or kept.is_symlink():
            number += 1
        out.rename(kept)


def is_exported(path: Path) -> bool:
    patterns = (*input_files.MODEL_FILES, *input_files.TOKENIZER_FILES)
    is_known = EXPORTED_WEIGHTS.fullmatch(path.name) or any(path.match(pattern) for pattern in patterns)
    return bool(is_known) and path.is_file() and not path.is_symlink()


def prepare_folder(run_dir: Path) -> None:
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir: {run_dir} is a file; give a folder")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: {run_dir} cannot be made ({error.strerror}); give another folder") from None
    if not os.access(run_dir, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"run_dir: {run_dir} is not yours to write; change its permissions or give another")


def check_is_unused(run_dir: Path) -> None:
    """Raises ValueError for a folder of the user in which a run would replace entries such as hf and weights."""
    names = sorted(path.name for path in run_dir.iterdir() if not EARLY_NAMES.fullmatch(path.name))
    if names:
        raise ValueError(
            f"run_dir: {run_dir} is not a run's: it holds {', '.join(names[:3])}{', ...' if names[3:] else ''} and no "
            f"{CONFIG}; give a new or empty folder"
        )


def read_settings(file: Path, config: ModelRunConfig) -> dict[str, object]:
    """Reads config.yaml of the run. Raises ValueError for a file that no run has written."""
    try:
        text = file.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError):
        settings = ""
    if settings is not None and not (isinstance(settings, dict) and {"run_dir", "model"} <= settings.keys()):
        raise ValueError(f"run_dir: {file.parent} is not a run's: no run has written its {CONFIG}; give another folder")
    return read_resolved(text, config)


def may_change(
    name: str,
    old: object,
    new: object,
    changeable: tuple[str, ...],
    settings: Mapping[str, object],
    fingerprinted: Mapping[str, object],
) -> bool:
    """Says whether a run may go on with another value of a setting. `settings`: all current ones."""
    if PATHS.fullmatch(name):  # If the contents are known, they are compared instead of the path.
        return name in fingerprinted or is_same_path(old, new)
    if name in VERIFIER_ADDRESSES:  # The address may change, but it must exist before and after.
        return bool(old) and bool(new)
    if name == "num_steps" and moves_with_num_steps(settings):
        return False
    return name.startswith(changeable) or name.endswith(CHANGEABLE_OF_OPTIMIZERS)


def is_same_path(old: object, new: object) -> bool:
    return isinstance(old, str) and isinstance(new, str) and resolved(old) == resolved(new)


def resolved(path: str) -> Path:
    return Path(path).expanduser().resolve()


def reason(differences: list[str]) -> str:
    """Explains why a setting may not change, if the usual reason (it changes the results) does not apply."""
    if any(difference.startswith("num_steps: ") for difference in differences):
        return (
            " (the decay of a learning rate without decay_steps ends with the run: num_steps changes it; to train on, "
            "start another run_dir with model.path=RUN_DIR/hf, and set decay_steps in runs that may become longer)"
        )
    return " (they change what the run computes)"


def check_num_steps(config: ModelRunConfig) -> None:
    """Raises ValueError if the run has already taken more steps than num_steps."""
    steps = saved_steps(config.run_dir / "checkpoints")
    if isinstance(config, RunConfig) and steps and steps[-1] > config.num_steps:
        raise ValueError(
            f"num_steps={config.num_steps}: {config.run_dir} already has a checkpoint of step {steps[-1]}; raise "
            f"num_steps to {steps[-1]} or more, choose another run_dir, or remove the checkpoints beyond step "
            f"{config.num_steps}"
        )


def moves_with_num_steps(settings: Mapping[str, object]) -> bool:
    """Says whether the decay of a learning rate ends with the run; if so, more steps change the schedule."""
    decays = [name for name, value in settings.items() if name.endswith(".optimizer.decay") and value != "constant"]
    return any(settings[f"{name}_steps"] is None for name in decays)
