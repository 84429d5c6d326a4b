"""Runs that really hang: a rank, a collective, a process, the verifier, a server, the file system.

Each ends with exit code 75, with the stacks of its ranks in the run directory and one line that names what hangs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.tiny_model import tiny_config, write_random_model
from megatron_oreal.engines.sglang.endpoints import write_endpoints
from tests.support.paths import ROOT
from tests.support.stub_server import VOCAB_SIZE, stub_servers
from tests.support.tiny_task import write_lines, write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
WORKER = ROOT / "tests/support/workers/hang_worker.py"
LONG = {
    f"{phase}_seconds": 200 for phase in ("start", "rollout", "update", "weight_sync", "checkpoint", "other", "end")
}
REWARD = "import time\n\ndef reward(*_, **__):\n    time.sleep(1000)\n    return 1.0\n"


@dataclass
class Hung:
    """What a run that has hung leaves."""

    code: int
    line: str
    stacks: dict[str, str]  # by file


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    write_tokenizer(folder / "model")
    write_random_model(folder / "model", tiny_config(vocab_size=VOCAB_SIZE, eos_token_id=1, pad_token_id=0), 0)
    rows = [{"id": f"p{n}", "prompt": f"{n}+1=", "answer": str(n)} for n in range(10)]
    write_lines(folder / "prompts.jsonl", rows)
    write_lines(folder / "sft.jsonl", [{"prompt": row["prompt"], "response": "\\boxed{1}"} for row in rows])
    (folder / "slow_reward.py").write_text(REWARD)
    return folder


def write_config(task: Path, folder: Path, command: str, deadlines: dict[str, float], **changes: Any) -> Path:
    data = {"format": "plain", "max_prompt_tokens": 8}
    if command == "sft":
        data |= {"examples": str(task / "sft.jsonl"), "sequences_per_step": 4, "max_tokens": 32}
    else:
        data |= {"prompts": str(task / "prompts.jsonl"), "prompts_per_step": 2}
    settings: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "num_steps": 3,
        "model": {"path": str(task / "model")},
        "data": data,
        "rollout": {"max_new_tokens": 8},
        "watchdog": LONG | deadlines,
    }
    if command == "train":
        settings["rollout"]["group_size"] = 2
        settings["algorithm"] = {"name": "outcome", "objective": "reinforce"}
    for name, value in changes.items():
        settings[name] = settings.get(name, {}) | value
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "config.yaml"


def command_line(command: str, config: Path, **environment: str) -> Hung:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_oreal.cli", command, str(config)],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env=os.environ | environment,
    )
    return what_is_left(config.parent / "run", done.returncode, done.stderr)


def what_is_left(run_dir: Path, code: int, stderr: str) -> Hung:
    lines = [line for line in stderr.splitlines() if line.startswith("Error: hang: ")]
    assert len(lines) == 1, stderr[-5000:]
    (folder,) = (run_dir / "hangs").iterdir()
    texts = {path.name: path.read_text() for path in folder.iterdir()}
    assert texts.pop("hang.txt") == f"{lines[0]}\n" and str(folder) in lines[0]
    assert not (run_dir / "run.lock").exists()
    return Hung(code, lines[0], texts)


def two_ranks(config: Path, how: str) -> Hung:
    """Runs the worker twice, as the launcher would, until the first rank has ended; then it ends the other one."""
    base = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    base |= {"MEGATRON_OREAL_STORE": str(config.parent / "store"), "PYTHONPATH": str(ROOT)}
    ranks = []
    for rank in range(2):
        environment = base | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(WORKER), str(config), how]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        stderr = ranks[0].communicate(timeout=250)[1]
        if how != "stopped":
            assert ranks[1].wait(60) == 75
        return what_is_left(config.parent / "run", ranks[0].returncode, stderr)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def test_a_rank_that_sleeps_is_named(task: Path, tmp_path: Path) -> None:
    config = write_config(task, tmp_path, "sft", {"update_seconds": 3}, parallel={"data": 2})
    hung = two_ranks(config, "sleep")
    assert hung.code == 75
    assert "update of step 1 has taken" in hung.line and "rank 1 on " in hung.line and "is in " in hung.line
    assert "oversleep (hang_worker.py:" in hung.line and "rank 0 on" not in hung.line
    assert set(hung.stacks) == {"rank_00000.txt", "rank_00001.txt"}
    assert "in oversleep" in hung.stacks["rank_00001.txt"]
    assert f"{os.sep}torch{os.sep}distributed{os.sep}" in hung.stacks["rank_00000.txt"]


def test_a_collective_that_one_rank_never_joins(task: Path, tmp_path: Path) -> None:
    config = write_config(task, tmp_path, "sft", {"update_seconds": 3}, parallel={"data": 2})
    hung = two_ranks(config, "collective")
    assert hung.code == 75
    assert "all ranks wait for each other" in hung.line and "in recv (distributed_c10d.py:" in hung.line
    assert "rank 0 on" in hung.line and "rank 1 on" in hung.line and len(hung.stacks) == 2


def test_a_process_that_stands_still_gives_no_sign_of_life(task: Path, tmp_path: Path) -> None:
    config = write_config(task, tmp_path, "sft", {"update_seconds": 3}, parallel={"data": 2})
    hung = two_ranks(config, "stopped")
    assert hung.code == 75
    assert "rank 1 gave no sign of life" in hung.line and set(hung.stacks) == {"rank_00000.txt"}


def test_a_verifier_that_hangs(task: Path, tmp_path: Path) -> None:
    verifier = {"function": "slow_reward:reward", "cpu_seconds": 1000, "require_stop": False}
    config = write_config(task, tmp_path, "train", {"rollout_seconds": 3}, verifier=verifier)
    hung = command_line("train", config, PYTHONPATH=f"{ROOT}{os.pathsep}{task}")
    assert hung.code == 75
    assert "rollout of step 0 has taken" in hung.line
    assert "thread verifier-0 in " in hung.line, hung.line
    assert "megatron_oreal/rewards/" in hung.stacks["rank_00000.txt"]


def test_a_server_that_never_answers(task: Path, tmp_path: Path) -> None:
    with stub_servers(task / "model", 2) as (first, second):
        first.faults, second.faults = ["hang"] * 100, ["hang"] * 100
        write_endpoints(tmp_path / "servers.json", [first.endpoint, second.endpoint])
        sglang = {"endpoints_file": str(tmp_path / "servers.json"), "weight_transport": "disk"}
        config = write_config(
            task, tmp_path, "train", {"rollout_seconds": 3}, rollout={"engine": "sglang", "sglang": sglang}
        )
        hung = command_line("train", config)
        assert hung.code == 75
        assert "rollout of step 0 has taken" in hung.line
        for server in (first, second):
            assert f"SGLang server {server.url} has not answered 2 requests, the oldest (POST /generate)" in hung.line
            assert f"SGLang server {server.url} is living; 2 responses are under way" in hung.stacks["rank_00000.txt"]
        assert hung.stacks["rank_00000.txt"].count("POST /generate ") == 4


def test_weights_that_a_server_does_not_take(task: Path, tmp_path: Path) -> None:
    with stub_servers(task / "model") as (server,):
        server.faults_of["/update_weights_from_disk"] = "hang"
        write_endpoints(tmp_path / "servers.json", [server.endpoint])
        sglang = {"endpoints_file": str(tmp_path / "servers.json"), "weight_transport": "disk"}
        config = write_config(
            task, tmp_path, "train", {"start_seconds": 15}, rollout={"engine": "sglang", "sglang": sglang}
        )
        hung = command_line("train", config)
    assert hung.code == 75 and "start of step 0 has taken" in hung.line
    assert f"SGLang server {server.url} has not answered 1 requests" in hung.line
    assert "(POST /update_weights_from_disk)" in hung.line


def test_a_file_system_that_does_not_answer(task: Path, tmp_path: Path) -> None:
    config = write_config(task, tmp_path, "sft", {"start_seconds": 3})
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "log.txt")  # whoever opens it waits for a reader
    hung = command_line("sft", config)
    assert hung.code == 75
    assert "start of step 0 has taken" in hung.line and "ProgressBar.__init__ (progress.py:" in hung.line
    assert "in open" in hung.stacks["rank_00000.txt"]


def test_the_launcher_passes_the_exit_code_on(task: Path, tmp_path: Path) -> None:
    config = write_config(task, tmp_path, "sft", {"start_seconds": 3}, parallel={"data": 2})
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "log.txt")
    hung = command_line("sft", config)
    assert hung.code == 75 and set(hung.stacks) == {"rank_00000.txt", "rank_00001.txt"}
    assert "rank 0 on" in hung.line and "rank 1 on" not in hung.line
