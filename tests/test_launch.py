"""What a process takes over from Slurm, and how SIGUSR1 ends a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.tiny_model import tiny_config, write_random_model
from megatron_oreal.launch import TORCH_RANKS, adopt_slurm_task, tasks_of_node
from tests.support.tiny_task import VOCABULARY, write_lines, write_tokenizer

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29000"}
TASK = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
ADOPTED = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def adopt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Returns torch's variables after a process with this environment has adopted its task."""

    def run(environment: dict[str, str]) -> dict[str, str]:
        clean = {name: v for name, v in os.environ.items() if name not in TORCH_RANKS and not name.startswith("SLURM")}
        for name in (*MASTER, "TORCHELASTIC_RUN_ID"):
            clean.pop(name, None)
        monkeypatch.setattr(os, "environ", clean | environment)
        adopt_slurm_task()
        return {name: os.environ[name] for name in TORCH_RANKS if name in os.environ}

    return run


def test_a_task_is_a_rank(adopt: Callable[..., dict[str, str]]) -> None:
    assert adopt(TASK | MASTER) == ADOPTED


def test_ranks_that_a_container_has_set_alone_are_completed(adopt: Callable[..., dict[str, str]]) -> None:
    """Pyxis sets RANK and LOCAL_RANK in NGC's PyTorch images, without WORLD_SIZE."""
    assert adopt(TASK | MASTER | {"RANK": "3", "LOCAL_RANK": "1"}) == ADOPTED
    single = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "RANK": "0", "LOCAL_RANK": "0"}
    assert adopt(single) == {}
    assert adopt(single | {"WORLD_SIZE": "1"}) == {}


def test_other_launchers_keep_their_ranks(adopt: Callable[..., dict[str, str]]) -> None:
    ranks = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}
    assert adopt(TASK | MASTER | ranks | {"TORCHELASTIC_RUN_ID": "x"}) == ranks
    assert adopt(ranks) == ranks
    assert adopt({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}, "a batch script is not rank 0 of 4"


def test_tasks_need_a_meeting_point(adopt: Callable[..., dict[str, str]]) -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR"):
        adopt(TASK)


@pytest.mark.parametrize(
    ("counts", "node", "tasks"), [("8(x16)", 15, 8), ("8", 0, 8), ("2,1", 1, 1), ("4(x2),3", 2, 3)]
)
def test_tasks_of_each_node(counts: str, node: int, tasks: int) -> None:
    assert tasks_of_node(counts, node) == tasks


def write_run(folder: Path, run_dir: str, **changes: Any) -> Path:
    if not (folder / "model").is_dir():
        write_tokenizer(folder / "model")
        config = tiny_config(vocab_size=len(VOCABULARY), max_position_embeddings=64, eos_token_id=1, pad_token_id=0)
        write_random_model(folder / "model", config, 0)
        rows = [{"prompt": f"{n}+1=", "response": f"\\boxed{{{n}}}"} for n in range(10)]
        write_lines(folder / "sft.jsonl", rows)
    settings = {
        "run_dir": str(folder / run_dir),
        "num_steps": 200,
        "model": {"path": str(folder / "model")},
        "data": {"examples": str(folder / "sft.jsonl"), "format": "plain", "sequences_per_step": 8},
        "rollout": {"max_new_tokens": 8},
        "checkpoint": {"every": 1000},
    } | changes
    settings["data"] |= {"max_prompt_tokens": 8, "max_tokens": 32}
    file = folder / f"{run_dir}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def losses(run_dir: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["policy/loss"]) for row in rows if "policy/loss" in row]


SFT = [sys.executable, "-m", "megatron_oreal.cli", "sft"]


def stop_early(file: Path, run_dir: Path) -> int:
    """Sends SIGUSR1 to the command alone after three steps; returns the step of the one checkpoint that it leaves."""
    errors = file.with_suffix(".txt")
    with errors.open("w") as stderr:
        process = subprocess.Popen([*SFT, str(file)], stderr=stderr)
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(150) == 75, errors.read_text()[-3000:]
    saved = [path.name for path in (run_dir / "checkpoints").iterdir()]
    assert len(saved) == 1, "checkpoint.every is longer than the run, so only the signal saves"
    return int(saved[0].removeprefix("step_"))


def test_usr1_saves_and_asks_for_another_start(tmp_path: Path) -> None:
    file = write_run(tmp_path, "stopped", parallel={"data": 2})
    assert 3 <= stop_early(file, tmp_path / "stopped") < 200


def test_a_signal_before_the_first_step_ends_the_run_after_it(tmp_path: Path) -> None:
    """A job whose time limit is shorter than the signal's lead must not go around in the queue without any step."""
    file = write_run(tmp_path, "hurried")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # The command inherits it, as if it had begun already.
    try:
        process = subprocess.Popen([*SFT, str(file)], stderr=subprocess.DEVNULL)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    process.send_signal(signal.SIGUSR1)
    assert process.wait(150) == 75
    assert [path.name for path in (tmp_path / "hurried" / "checkpoints").iterdir()] == ["step_000001"]


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_stopped_run_ends_with_the_numbers_of_an_unbroken_one(tmp_path: Path) -> None:
    subprocess.run([*SFT, str(write_run(tmp_path, "unbroken"))], check=True, capture_output=True)
    file = write_run(tmp_path, "stopped")
    step = stop_early(file, tmp_path / "stopped")
    again = subprocess.run([*SFT, str(file)], check=False, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resumed at step {step} of 200" in again.stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "unbroken")
