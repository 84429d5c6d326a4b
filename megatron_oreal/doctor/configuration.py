"""Checks the configuration of a run: its paths, its layout against processes and GPUs, its run directory, its ports."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig, load_config, num_processes
from megatron_oreal.doctor.findings import Finding, error, of_mistake, ok
from megatron_oreal.doctor.gpus import GpuFacts, check_memory_need
from megatron_oreal.run.dry_run import check_algorithm, describe_model
from megatron_oreal.run.run_lock import LOCK, describe_owner, is_held, read_owner

Config = TrainConfig | SftConfig | EvalRunConfig
COMMANDS = ("train", "sft", "eval", "passrate")


def load_as(command: str, path: Path, overrides: Sequence[str]) -> Config:
    if command == "train":
        return load_config(TrainConfig, path, overrides)
    if command == "sft":
        return load_config(SftConfig, path, overrides)
    return load_config(EvalRunConfig, path, overrides)


def load_any(path: Path, overrides: Sequence[str], command: str = "") -> Config:
    """Reads the configuration of `command`, or of the first command that accepts it.

    Raises ValueError as `load_config` does; if no command accepts the file, the error is that of `train`.
    """
    if command:
        return load_as(command, path, overrides)
    mistakes: list[ValueError] = []
    for each in ("train", "sft", "eval"):
        try:
            return load_as(each, path, overrides)
        except ValueError as mistake:
            mistakes.append(mistake)
    raise mistakes[0]


def check_configuration(config: Config) -> Iterator[Finding]:
    """Checks model, paths, layout and run directory, which also works on a login node; `check_fit` does the rest."""
    is_fine = True
    for finding in (*check_model(config), *check_paths(config), *check_run_dir(config.run_dir)):
        is_fine &= finding.status == "ok"
        yield finding
    try:
        count = num_processes(config.parallel)
    except ValueError as mistake:
        yield of_mistake("layout", mistake)
        return
    if is_fine:
        yield ok("config", f"{count} process{'es' * (count > 1)}, run_dir {config.run_dir}")


def check_model(config: Config) -> Iterator[Finding]:
    path = config.model.path
    if not path.exists():
        yield error("config", f"model.path: {path} does not exist", "download the model, or mount its folder")
        return
    try:
        line = describe_model(config)
        check_algorithm(config)
    except ValueError as mistake:
        yield of_mistake("config", mistake)
        return
    yield ok("config", line)
    if missing := missing_weights(path):
        yield error("config", f"model.path: {missing} is not in {path}", "download the model again")


def missing_weights(path: Path) -> str:
    """Returns a file of weights that the index names and the folder lacks; empty if there is none."""
    try:
        index = json.loads((path / "model.safetensors.index.json").read_bytes())
        names = sorted({str(name) for name in index["weight_map"].values()})
    # The loader of the weights reports these errors better
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""
    return next((name for name in names if not (path / name).is_file()), "")


def prompt_files(config: Config) -> dict[str, Path]:
    files = {f"eval.prompts.{name}": file for name, file in config.eval.prompts.items()}
    if isinstance(config, TrainConfig):
        files["data.prompts"] = config.data.prompts
    elif isinstance(config, SftConfig):
        files["data.examples"] = config.data.examples
    return files


def check_paths(config: Config) -> Iterator[Finding]:
    for setting, file in prompt_files(config).items():
        try:
            with file.open("rb") as opened:
                first = next((line for line in opened if line.strip()), b"")
            is_line = isinstance(json.loads(first), dict)
        except OSError as raised:
            yield error("config", f"{setting}: {file} cannot be read ({raised.strerror})", "give an existing file")
        except ValueError:
            yield error("config", f"{setting}: the first line of {file} is no JSON", "give one JSON object a line")
        else:
            if not is_line:
                yield error("config", f"{setting}: {file} holds no JSON objects", "give one JSON object a line")


def check_run_dir(folder: Path) -> Iterator[Finding]:
    """Checks whether another run owns the directory."""
    lock = folder / LOCK
    try:
        content, age = lock.read_bytes(), time.time() - lock.stat().st_mtime
        owner = read_owner(content)
        if is_held(lock, owner, age):
            yield of_mistake("run_dir", ValueError(describe_owner(lock, owner, age)))
    except FileNotFoundError:
        return
    except OSError as raised:
        yield error(
            "run_dir", f"{lock} cannot be read ({raised.strerror})", "give another run_dir, or change its owner"
        )


def check_fit(config: Config, facts: GpuFacts) -> Iterator[Finding]:
    """Compares the layout with this host's GPUs, and the run's permanent GPU memory with their memory."""
    if not facts.gpus:
        return
    try:
        count = num_processes(config.parallel)
    except ValueError:
        return  # `check_configuration` reports this
    if "RANK" not in os.environ and count > len(facts.gpus):
        yield error(
            "layout",
            f"{count} processes on {len(facts.gpus)} GPUs",
            "lower parallel.data, or start with torchrun or srun on more nodes",
        )
    if isinstance(config, (TrainConfig, SftConfig)):
        from megatron_oreal.run.device_defaults import estimate
        from megatron_oreal.weights.families import read_architecture

        try:
            states = estimate(config, read_architecture(config.model.path)).states
        except ValueError:
            return  # `check_configuration` reports the error of the model
        yield from check_memory_need(states, facts, "parallel.tensor or parallel.pipeline")
