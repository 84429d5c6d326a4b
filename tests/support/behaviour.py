"""Records short runs of one revision and compares them with another revision's, to show that no number changes.

    python tests/support/behaviour.py record FOLDER            # run in the root of the revision
    python tests/support/behaviour.py resume OLD_FOLDER FOLDER # continues OLD_FOLDER's runs with this revision
    python tests/support/behaviour.py compare FOLDER FOLDER    # exit code 1 names each value that differs

Make both recordings on one machine, because the last digits depend on the processor. A recording holds the supervised
warm-up of the quickstart (SFT), 20 steps of OREAL with TP 2, 5 steps each of PPO, GRPO and SFT, and, with --sglang,
5 steps on a real SGLang server.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import yaml

QUICKSTART = Path("examples/quickstart")
RUNS = ("sft", "oreal", "ppo", "grpo", "sft_more", "sglang")
RESUMED_STEPS = 3  # steps after the recorded ones
# For revisions before algorithm.reward_model, which have the algorithms' sections at the top level of the file.
TOP_SECTIONS = ("reward_model", "critic")


@click.group()
def main() -> None:
    """Checks that two revisions compute the same numbers."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--sglang", is_flag=True, help="Record the run on an SGLang server too.")
@click.option("--old-sections", is_flag=True, help="For revisions with reward_model and critic at the top.")
def record(folder: Path, sglang: bool, old_sections: bool) -> None:
    folder.mkdir(parents=True)
    data = folder / "data"
    execute(str(QUICKSTART / "prepare.py"), "--out", str(data), "--seed", "0")
    for name in RUNS if sglang else RUNS[:-1]:
        settings = configuration(folder, name)
        execute_run(folder, name, sections_at_top(settings) if old_sections else settings)


@main.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--old-sections", is_flag=True, help="For revisions with reward_model and critic at the top.")
def resume(old: Path, folder: Path, old_sections: bool) -> None:
    """Continues the runs of `old` for a few steps. For a comparison, give both revisions the same number of steps."""
    folder.mkdir(parents=True)
    for name in RUNS[1:]:
        if not (old / name).is_dir():
            continue
        shutil.copytree(old / name, folder / name)
        settings = configuration(old, name)
        settings["num_steps"] += RESUMED_STEPS
        settings["run_dir"] = str(folder / name)
        execute_run(folder, name, sections_at_top(settings) if old_sections else settings)


@main.command()
@click.argument("old", type=click.Path(path_type=Path, exists=True))
@click.argument("new", type=click.Path(path_type=Path, exists=True))
def compare(old: Path, new: Path) -> None:
    differences = []
    names = [name for name in RUNS if (old / name).is_dir()]
    num_values = 0
    added: dict[str, set[str]] = {name: set() for name in names}
    for name in names:
        before, after = read_records(old / name), read_records(new / name)
        if len(before) != len(after):
            differences.append(f"{name}: {len(before)} records, then {len(after)}")
        for one, other in zip(before, after, strict=False):
            num_values += len(one)
            differences += [
                f"{name}, step {one['step']}: {key} {value} -> {other.get(key)}"
                for key, value in sorted(one.items())
                if not is_same(value, other.get(key), exact=name != "sglang")
            ]
            added[name] |= other.keys() - one.keys()
    for name in filter(added.get, names):
        click.echo(f"{name}: only the second measures {', '.join(sorted(added[name]))}")
    for line in differences:
        click.echo(line)
    click.echo(f"{num_values} values of {', '.join(names)}; {len(differences)} differ")
    sys.exit(1 if differences else 0)


def is_same(value: Any, other: Any, exact: bool) -> bool:
    """Compares two values. Runs with SGLang differ in the last digits, because arrival times decide its batches."""
    if exact or not isinstance(value, float) or not isinstance(other, float):
        return bool(value == other)
    return math.isclose(value, other, rel_tol=1e-6, abs_tol=1e-8)


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """Reads all metrics except those of time and memory."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    is_timed = re.compile(r"^(time|memory)/|seconds|per_second").search
    return [{key: value for key, value in json.loads(line).items() if not is_timed(key)} for line in lines]


def configuration(folder: Path, name: str) -> dict[str, Any]:
    """Returns one run's settings; reinforcement learning starts each model from the warmed-up policy's weights."""
    is_sft = name.startswith("sft")
    settings: dict[str, Any] = yaml.safe_load((QUICKSTART / ("sft.yaml" if is_sft else "config.yaml")).read_text())
    settings |= {"run_dir": str(folder / name), "seed": 0, "checkpoint": {"every": 5, "keep_last": 1}}
    settings["eval"] = {"prompts": {"heldout": str(folder / "data" / "heldout.jsonl")}, "every": 10, "max_prompts": 64}
    if is_sft:
        settings["model"]["path"] = str(folder / "data" / "model")
        settings["data"]["examples"] = str(folder / "data" / "sft.jsonl")
        settings["num_steps"] = 600 if name == "sft" else 5
        settings["checkpoint"]["every"] = settings["num_steps"]
        settings["policy"]["optimizer"].pop("min_lr")
        settings["policy"]["optimizer"]["decay"] = "constant"
        return settings
    settings["model"]["path"] = str(folder / "sft" / "hf")
    settings["data"]["prompts"] = str(folder / "data" / "train.jsonl")
    settings["num_steps"] = 20 if name == "oreal" else 5
    settings["policy"]["optimizer"] |= {"decay": "constant", "warmup_steps": 0}
    if name == "ppo":
        critic = {"optimizer": {"lr": 5.0e-4}}
        settings["algorithm"] = {"name": "ppo", "policy_minibatches": 2, "kl_coef": 0.01, "critic": critic}
        settings["algorithm"]["critic_minibatches"] = 4
    elif name == "grpo":
        settings["algorithm"] = {"name": "outcome", "objective": "grpo", "kl_coef": 0.01}
        settings["parallel"] = {"data": 2}
    if name == "sglang":
        python = Path(".venv-sglang/bin/python").absolute()
        settings["rollout"] |= {"engine": "sglang", "sglang": {"python": str(python)}}
    return settings


def sections_at_top(settings: dict[str, Any]) -> dict[str, Any]:
    algorithm = dict(settings.get("algorithm", {}))
    moved = {name: algorithm.pop(name) for name in TOP_SECTIONS if name in algorithm}
    return settings | moved | ({"algorithm": algorithm} if algorithm else {})


def execute_run(folder: Path, name: str, settings: dict[str, Any]) -> None:
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    execute("-m", "megatron_oreal.cli", "sft" if name.startswith("sft") else "train", str(file))


def execute(*arguments: str) -> None:
    click.echo(" ".join(arguments))
    subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
    main()
