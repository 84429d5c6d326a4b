"""Makes run directories for the report: random metrics in the format of a run, and the run's other files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import yaml

from tests.support.viewed_runs import row, write_rows

SETTINGS = {
    "seed": 0,
    "num_steps": 10,
    "model": {"path": "tiny"},
    "rollout": {"group_size": 4, "temperature": 1.0},
    "checkpoint": {"best_metric": "eval/math/greedy"},
    "eval": {"prompts": {"math": "heldout.jsonl"}, "every": 5},
}
PHASES = {"rollout": 3.0, "update": 2.0, "weight_sync": 0.5, "other": 0.1}


def draw_record(rng: random.Random, step: int, num_steps: int) -> dict[str, float]:
    share = step / num_steps
    record: dict[str, float] = {
        "step": step,
        "reward/mean": 0.3 + 0.5 * share + rng.gauss(0, 0.03),
        "reward/groups_mixed": rng.randrange(20, 40),
        "reward/pass_at_2": 0.5 + 0.4 * share,
        "reward/pass_at_group_size": 0.6 + 0.4 * share,
        "policy/loss": math.exp(-3 * share) + rng.gauss(0, 0.02),
        "policy/entropy": 0.8 - 0.6 * share,
        "policy/kl": 0.1 * share,
        "policy/grad_norm": rng.random(),
        "policy/lr": 1e-6,
        "policy/mismatch": 1e-3 * rng.random(),
        "policy/mismatch_max": rng.random(),
        "policy/weight_max": 2.0,
        "policy/weight_zero_share": 0.3,
        "rollout/length_mean": 500 + 200 * share,
        "rollout/length_max": 2000,
        "rollout/length_limit_share": 0.05,
        "rollout/staleness_mean": 1.0,
        "verifier/timeout": rng.randrange(3),
        "train/num_tokens": 100_000,
        "time/in_update/policy_train": 1.5,
        "time/step_seconds": sum(PHASES.values()),
        "time/update_tokens_per_second": 50_000,
        **{f"time/{phase}_seconds": seconds for phase, seconds in PHASES.items()},
        **{f"judge/set_{number}/agreed": rng.randrange(9) for number in range(20)},
    }
    if step % 5 == 0:
        record["eval/math/greedy"] = 0.2 + 0.5 * share
    return record


def write_training_run(folder: Path, num_steps: int, seed: int = 0, group_size: int = 4, samples: bool = True) -> Path:
    """Writes metrics, samples, a checkpoint and the environment of a run that has finished."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    settings = SETTINGS | {"run_dir": str(folder), "seed": seed, "num_steps": num_steps}
    settings["rollout"] = {"group_size": group_size, "temperature": 1.0}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    records = [draw_record(rng, step, num_steps) for step in range(num_steps)]
    records.append({"step": num_steps, "eval/math/greedy": 0.75, "time/step_seconds": 1.0})
    write_rows(folder / "metrics.jsonl", records)
    for step in range(num_steps if samples else 0):
        rows = [
            row(
                group=number // 4,
                prompt_id=f"p{number // 4}",
                source=("math", "gsm8k")[number // 4 % 2],
                status=rng.choice(("correct", "incorrect", "no_answer")),
                num_tokens=rng.randrange(100, 900),
                prompt_pass_rate=(number // 4 % 5) / 4,
            )
            for number in range(40)
        ]
        write_rows(folder / "rollouts" / f"step_{step:06d}.jsonl", rows)
    checkpoint = folder / "checkpoints" / f"step_{num_steps:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "run.json").write_text(json.dumps({"progress": {"evaluation": {"eval/math/greedy": 0.75}}}))
    start = {"started": "a day", "start_step": 0, "commit": "abc", "num_processes": 2, "active_parameters": 10**9}
    write_rows(folder / "environment.jsonl", [start | {"gpu": "NVIDIA H100 80GB HBM3"}])
    return folder
