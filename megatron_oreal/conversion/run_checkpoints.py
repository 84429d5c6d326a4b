"""Finds a checkpoint of a run by name ("best", "last", or the number of a step) and writes it for Hugging Face."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_oreal.checkpoint.train_state import saved_steps
from megatron_oreal.conversion.conversion import ConversionOptions, copy_companions, megatron_to_hf
from megatron_oreal.conversion.trainer_shards import is_trainer_model
from megatron_oreal.observability.files import temporary_directory

POLICY = "policy"


@dataclass(frozen=True, slots=True)
class FoundCheckpoint:
    run_dir: Path
    step: int
    words: str  # why this one, for example "eval/gsm8k/greedy 0.62, the best of 3"

    @property
    def folder(self) -> Path:
        return self.run_dir / "checkpoints" / f"step_{self.step:06d}"

    @property
    def export(self) -> Path:
        """Returns the default folder for the export of the policy."""
        return self.run_dir / "exports" / f"step_{self.step:06d}"


def find_checkpoint(run_dir: Path, name: str, metric: str = "") -> FoundCheckpoint:
    """Finds the checkpoint `name` of a run. The best one has the highest `metric`, or checkpoint.best_metric.

    Raises ValueError, naming what there is, where the run has no such checkpoint.
    """
    folder = run_dir / "checkpoints"
    steps = saved_steps(folder)
    if not steps:
        what = "is no run_dir of train or sft: it has no checkpoints/"
        if not run_dir.exists():
            what = "does not exist; give the run_dir of train or sft"
        elif folder.is_dir():
            what = "holds no checkpoint yet; checkpoint.every says when it does"
        raise ValueError(f"RUN: {run_dir} {what}")
    known = f"the checkpoints of {run_dir} are those of the steps {', '.join(map(str, steps))}"
    if metric and name != "best":
        raise ValueError(f"--metric chooses the best checkpoint: drop it, or name best instead of {name}")
    if name == "last":
        return FoundCheckpoint(run_dir, steps[-1], "the last one")
    if name == "best":
        return best_checkpoint(run_dir, steps, metric or best_metric(run_dir))
    number = name.removeprefix("step_")
    if not number.isdecimal():
        raise ValueError(f"CHECKPOINT must be best, last or the number of a step, got {name!r}; {known}")
    if int(number) not in steps:
        raise ValueError(f"CHECKPOINT: there is no step {int(number)}; {known}")
    return FoundCheckpoint(run_dir, int(number), "as asked")


def best_checkpoint(run_dir: Path, steps: list[int], metric: str) -> FoundCheckpoint:
    """Returns the first of the checkpoints with the highest metric, as the run itself ranks them."""
    evaluations = {step: read_evaluation(run_dir, step) for step in steps}
    measured = sorted({name for evaluation in evaluations.values() for name in evaluation})
    if not metric:
        greedy = [name for name in measured if name.endswith("/greedy")]
        if len(greedy) != 1:
            raise ValueError(
                "CHECKPOINT: best is not decided, because the run has no checkpoint.best_metric: give --metric "
                f"({', '.join(measured) or 'no checkpoint was evaluated'}), or name last or a step"
            )
        metric = greedy[0]
    scores = {step: values[metric] for step, values in evaluations.items() if metric in values}
    if not scores:
        raise ValueError(
            f"--metric: no checkpoint has {metric!r}; measured: {', '.join(measured) or 'nothing'}: let eval.every "
            "divide checkpoint.every, or name last or a step"
        )
    step = min(scores, key=lambda step: (-scores[step], step))
    return FoundCheckpoint(run_dir, step, f"{metric} {scores[step]:.4g}, the best of {len(scores)} that were evaluated")


def read_evaluation(run_dir: Path, step: int) -> dict[str, float]:
    file = run_dir / "checkpoints" / f"step_{step:06d}" / "run.json"
    try:
        return dict(json.loads(file.read_bytes())["progress"]["evaluation"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"RUN: {file} is damaged; remove {file.parent}, or name another checkpoint") from None


def run_settings(run_dir: Path) -> dict[str, Any]:
    file = run_dir / "config.yaml"
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"RUN: {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        raise ValueError(f"RUN: {file} is not the configuration of a run")
    return settings


def best_metric(run_dir: Path) -> str:
    return str((run_settings(run_dir).get("checkpoint") or {}).get("best_metric") or "")


def export_policy(found: FoundCheckpoint, out: Path, options: ConversionOptions) -> None:
    """Writes the checkpoint's policy as a Hugging Face directory with the run's tokenizer, whole or not at all."""
    model = run_settings(found.run_dir)["model"]
    source = Path(model["path"]).expanduser()
    if not (source / "config.json").is_file():
        raise ValueError(
            f"RUN: {source}, the model.path of {found.run_dir}, is not here; start the command where the run was "
            "started, or use `megatron-oreal convert mcore2hf --hf`"
        )
    if not is_trainer_model(found.folder / POLICY):
        raise ValueError(f"RUN: {found.folder} holds no policy; remove it, or name another checkpoint")
    with temporary_directory(out) as directory:
        converted = directory / "converted"
        megatron_to_hf(found.folder / POLICY, converted, options, source)
        if model.get("tokenizer"):
            copy_companions(Path(model["tokenizer"]).expanduser(), directory)
        for file in list(converted.iterdir()):
            if not (directory / file.name).exists() or file.name in ("config.json", "generation_config.json"):
                file.replace(directory / file.name)
        shutil.rmtree(converted)


def exported_policy(run_dir: Path, name: str, metric: str = "", num_workers: int = 1) -> tuple[Path, FoundCheckpoint]:
    """Returns the Hugging Face directory of a checkpoint's policy, which is written unless it is there already."""
    found = find_checkpoint(run_dir, name, metric)
    marker = found.export / "config.json"
    is_current = marker.is_file() and marker.stat().st_mtime >= (found.folder / "run.json").stat().st_mtime
    if not is_current:
        export_policy(found, found.export, ConversionOptions(num_workers=num_workers))
    return found.export, found
