"""Mistakes, a full disk, a run that diverges and Ctrl-C: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

Settings = dict[str, Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]  # the fixture command_line
COMMAND = [sys.executable, "-m", "megatron_oreal.cli"]

# Runs the command line on many cases in one process: starting torch and Megatron takes longer than all the cases.
PROGRAM = """
import json, os, sys
from pathlib import Path
from megatron_oreal import cli

cases, outcomes = json.loads(Path(sys.argv[1]).read_text()), {}
own_stderr, captured = os.dup(2), Path(sys.argv[1]).with_suffix(".stderr")
for name, case in cases.items():
    sys.argv[1:] = case["arguments"]
    os.environ.update(case["environment"])
    with captured.open("wb") as file:
        os.dup2(file.fileno(), 2)
    exit_code = 0
    try:
        cli.main()
    except SystemExit as end:
        exit_code = end.code
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        exit_code = 1
    sys.stderr.flush()
    os.dup2(own_stderr, 2)
    for variable in case["environment"]:
        del os.environ[variable]
    outcomes[name] = {"exit_code": exit_code, "stderr": captured.read_text()}
print(json.dumps(outcomes))
"""


@dataclass(frozen=True, slots=True)
class Case:
    overrides: list[str]
    message: str  # a regular expression for the beginning of the error
    checkpoint: str = ""  # a file to cut in half in the newest checkpoint of an earlier run
    environment: tuple[tuple[str, str], ...] = ()


DAMAGED = r"run_dir: checkpoint .*/step_000002 is damaged \(.*\); remove it to resume from .*/step_000001$"
CASES = {
    "missing prompts": Case(["data.prompts={bad}/none.jsonl"], r"data\.prompts: .*none\.jsonl does not exist; give"),
    "empty prompts": Case(["data.prompts={bad}/empty.jsonl"], r"data\.prompts: .*empty\.jsonl is empty; it needs"),
    "malformed line": Case(
        ["data.prompts={bad}/malformed.jsonl"], r"data\.prompts: .* line 3 is not JSON \(.*; fix the"
    ),
    "no answer": Case(["data.prompts={bad}/unanswered.jsonl"], r"data\.prompts: .* line 2: answer is missing; give"),
    "held-out prompts": Case(["eval.prompts.heldout={bad}/malformed.jsonl"], r"eval\.prompts\.heldout: .* line 3 is"),
    "only long prompts": Case(
        ["data.max_prompt_tokens=3"],
        r"data\.max_prompt_tokens=3: each of the 10 prompts is longer; raise it to 4 or more for eval\.prompts\.held",
    ),
    "unknown stop token": Case(["rollout.stop_tokens=['<end>']"], r"rollout\.stop_tokens: '<end>' is not one token"),
    "no tokenizer": Case(["model.tokenizer={bad}"], r"model\.tokenizer: .* holds no tokenizer; give a directory"),
    "broken tokenizer": Case(["model.tokenizer={bad}/tokenizer"], r"model\.tokenizer: .* cannot be loaded \("),
    "no chat template": Case(["data.format=chat"], r"data\.format=chat: the tokenizer has no chat template; set data"),
    "another's tokenizer": Case(["model.path={bad}/small"], r"model\.tokenizer: its token 1\d is beyond the model's"),
    "unknown architecture": Case(["model.path={bad}/mamba"], r"model\.path: model_type 'mamba' is not supported; kn"),
    "no weights": Case(["model.path={bad}/no_weights"], r"model\.path: .* holds neither model\.safetensors nor"),
    "missing file": Case(["model.path={bad}/missing_file"], r"model\.path: .*b\.safetensors cannot be read: "),
    "truncated weights": Case(["model.path={bad}/truncated"], r"model\.path: .*model\.safetensors cannot be read: "),
    "missing tensor": Case(["model.path={bad}/missing_tensor"], r"model\.path: .* has no tensor model\.layers\.1\."),
    "misshapen tensor": Case(
        ["model.path={bad}/misshapen"], r"model\.path: .*down_proj.* has the shape .*config\.json"
    ),
    "misshapen query": Case(
        ["model.path={bad}/misshapen_query"], r"model\.path: .*q_proj.* has the shape .*config\.json"
    ),
    "short embedding": Case(["model.path={bad}/short"], r"model\.path: .*embed_tokens.* shape \(16, 32\), config"),
    "broken index": Case(["model.path={bad}/broken_index"], r"model\.path: .*index\.json is not an index; save the"),
    "no reward model": Case(
        ["algorithm.reward_model.path={bad}"], r"algorithm\.reward_model\.path: .* is not a Hugging Face directory of"
    ),
    "no Transformer Engine": Case(["model.implementation=transformer_engine"], r"model\.implementation=transformer_e"),
    "run_dir is a file": Case(["run_dir={bad}/file"], r"run_dir: .*file is a file; give a folder"),
    "run_dir in a file": Case(["run_dir={bad}/file/run"], r"run_dir: .* cannot be made \(Not a directory\); give"),
    "run_dir not writable": Case(["run_dir=/proc/run"], r"run_dir: /proc/run cannot be made \(.*\); give another"),
    "another configuration": Case(
        ["run_dir={resumed}", "seed=77"],
        r"run_dir: .* belongs to another configuration \(seed: \d+ -> 77\); choose another run_dir, or",
    ),
    "damaged parameters": Case(["run_dir={resumed}"], DAMAGED, "policy/__0_0.distcp"),
    "damaged optimizer": Case(["run_dir={resumed}"], DAMAGED, "reward_model/.metadata"),
    "damaged random state": Case(["run_dir={resumed}"], DAMAGED, "random_t00_p00.pt"),
    "damaged record": Case(["run_dir={resumed}"], DAMAGED, "run.json"),
}


@pytest.fixture(scope="module")
def base_config(task: Path, train_config: Settings, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Three of the prompts are too long."""
    folder = tmp_path_factory.mktemp("base")
    long = [{"id": f"long{n}", "prompt": "1+" * 8 + "=", "answer": "8"} for n in range(3)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text((task / "train.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in long))
    data = train_config["data"] | {"prompts": str(prompts)}
    return train_config | {"num_steps": 2, "data": data, "checkpoint": {"every": 1, "keep_last": 2}}


@pytest.fixture(scope="module")
def finished(base_config: Settings, command_line: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of steps 1 and 2."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    done = command_line("train", base_config | {"run_dir": str(run_dir)}, run_dir.parent / "config.yaml")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def bad(task: Path, warm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, tokenizers and models with one defect each."""
    folder = tmp_path_factory.mktemp("bad")
    lines = (task / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "empty.jsonl").write_text("\n")
    (folder / "malformed.jsonl").write_text(lines[0] + lines[1] + lines[2][:-5] + "\n" + lines[3])
    (folder / "unanswered.jsonl").write_text(lines[0] + '{"id": "x", "prompt": "1+1="}\n')
    (folder / "file").write_text("")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text('{"model": {}}')
    write_bad_models(folder, warm_model)
    return folder


def write_bad_models(folder: Path, good: Path) -> None:
    tensors, config = load_file(good / "model.safetensors"), json.loads((good / "config.json").read_text())
    embedding = "model.embed_tokens.weight"
    down, query = "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"

    def copy(name: str) -> Path:
        return Path(shutil.copytree(good, folder / name))

    for name, change in {"small": {"vocab_size": 10}, "mamba": {"model_type": "mamba"}}.items():
        (copy(name) / "config.json").write_text(json.dumps(config | change))
    (copy("no_weights") / "model.safetensors").unlink()
    cut_in_half(copy("truncated") / "model.safetensors")
    others = {name: tensor for name, tensor in tensors.items() if name != down}
    save_file(others, copy("missing_tensor") / "model.safetensors")
    save_file(tensors | {down: tensors[down][:, :-1].contiguous()}, copy("misshapen") / "model.safetensors")
    save_file(tensors | {query: tensors[query][:-1].contiguous()}, copy("misshapen_query") / "model.safetensors")
    save_file(tensors | {embedding: tensors[embedding][:-1].contiguous()}, copy("short") / "model.safetensors")
    (copy("broken_index") / "model.safetensors.index.json").write_text("{")
    sharded = copy("missing_file")
    (sharded / "model.safetensors").rename(sharded / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors") | {down: "b.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_in_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.fixture(scope="module")
def outcomes(base_config: Settings, finished: Path, bad: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Exit code, stderr and what was written, of each of CASES."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "config.yaml").write_text(yaml.safe_dump(base_config))
    cases = {}
    for number, (name, case) in enumerate(CASES.items()):
        run_dir = folder / f"run{number}"
        if "{resumed}" in case.overrides[0]:
            shutil.copytree(finished, run_dir)
        if case.checkpoint:
            cut_in_half(run_dir / "checkpoints" / "step_000002" / case.checkpoint)
        overrides = [override.format(bad=bad, resumed=run_dir) for override in case.overrides]
        arguments = ["train", str(folder / "config.yaml"), f"run_dir={run_dir}", *overrides]
        cases[name] = {"arguments": arguments, "environment": dict(case.environment)}
    (folder / "cases.json").write_text(json.dumps(cases))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder / "cases.json")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: Settings = json.loads(done.stdout)
    for number, name in enumerate(CASES):
        found[name]["files"] = files_in(folder / f"run{number}")
    return found


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line(outcomes: Settings, finished: Path, name: str) -> None:
    outcome, case = outcomes[name], CASES[name]
    message = only_error(outcome["stderr"])
    assert outcome["exit_code"] == 2
    assert re.match(case.message, message), message
    was_there = files_in(finished) if "{resumed}" in case.overrides[0] else set()
    assert outcome["files"] == was_there


def only_error(stderr: str) -> str:
    assert stderr.startswith("Error: ") and stderr.count("\n") == 1, stderr
    return stderr.removeprefix("Error: ").rstrip("\n")


def test_long_prompts_are_skipped_and_noted(finished: Path) -> None:
    assert "skipped 3 prompts longer than data.max_prompt_tokens" in (finished / "log.txt").read_text()


def test_a_full_disk_ends_the_run_and_not_its_checkpoints(
    base_config: Settings, finished: Path, tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(finished, tmp_path / "run"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(base_config | {"run_dir": str(run_dir), "num_steps": 3}))
    before = files_in(run_dir / "checkpoints")
    command = [*COMMAND, "train", str(tmp_path / "config.yaml")]
    parameters = run_dir / "checkpoints" / "step_000002" / "policy" / "__0_0.distcp"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: limit_file_size(parameters.stat().st_size - 1),
    )
    assert done.returncode == 1, done.stderr
    assert errors(done.stderr) == [done.stderr.splitlines()[-1]]
    assert re.search(
        r"Error: checkpoint .*step_000003 could not be written: .*; the run then goes on after step 2", done.stderr
    )
    assert files_in(run_dir / "checkpoints") == before
    assert not list((run_dir / "checkpoints").glob(".*"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 2" in done.stderr
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3] and (run_dir / "hf" / "model.safetensors").is_file()


def limit_file_size(num_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def errors(stderr: str) -> list[str]:
    assert "Traceback" not in stderr, stderr
    return [line for line in stderr.splitlines() if line.startswith("Error: ")]


def test_a_diverged_run_names_the_step_and_keeps_its_checkpoints(
    base_config: Settings, command_line: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    settings = base_config | {"run_dir": str(run_dir), "num_steps": 6}
    done = command_line("train", settings, tmp_path / "config.yaml", "policy.optimizer.lr=1e30")
    assert done.returncode == 1, done.stderr
    (error,) = errors(done.stderr)
    stopped = re.match(
        r"Error: stopped at step (\d): (policy/\S+|.*logits) (is|are) .*; the checkpoints are unt", error
    )
    assert stopped, error
    assert error == done.stderr.splitlines()[-1]
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert saved and int(saved[-1].removeprefix("step_")) <= int(stopped[1])


def test_several_processes_say_it_once(base_config: Settings, bad: Path, command_line: Run, tmp_path: Path) -> None:
    settings = base_config | {"run_dir": str(tmp_path / "run"), "parallel": {"data": 2}}
    override = f"data.prompts={bad}/malformed.jsonl"
    done = command_line("train", settings, tmp_path / "config.yaml", override)
    assert done.returncode == 2
    assert re.match(r"data\.prompts: .*malformed\.jsonl line 3 is not JSON", only_error(done.stderr))
    assert files_in(tmp_path) == {"config.yaml"}


@contextmanager
def running(settings: Settings, folder: Path, **layout: int) -> Iterator[subprocess.Popen[str]]:
    """A long run that has finished its first step, in a process group of its own."""
    run_dir = folder / "run"
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(settings | {"run_dir": str(run_dir), "num_steps": 10_000, "parallel": layout}))
    process = subprocess.Popen(
        [*COMMAND, "train", str(config)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").is_file() and (run_dir / "metrics.jsonl").stat().st_size > 0)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 100) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Those that any of its threads has started."""
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def descendants(pid: int) -> list[int]:
    return [process for child in children(pid) for process in (child, *descendants(child))]


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("layout", [{}, {"data": 2}], ids=["one process", "two processes"])
def test_ctrl_c_ends_a_run_quickly_and_quietly(base_config: Settings, tmp_path: Path, layout: dict[str, int]) -> None:
    with running(base_config, tmp_path, **layout) as process:
        started = descendants(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # what a terminal does
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert stderr.splitlines()[-1].startswith("Interrupted by SIGINT: the same command continues")
        assert errors(stderr) == []
        wait_until(lambda: not any(map(is_alive, started)), seconds=5)


def test_a_killed_process_takes_the_run_with_it(base_config: Settings, tmp_path: Path) -> None:
    with running(base_config, tmp_path, data=2) as process:
        started = descendants(process.pid)
        trainers = [
            int(child) for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ]
        os.kill(trainers[-1], signal.SIGKILL)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == 1
        assert len(errors(stderr)) == 1 and "was ended by SIGKILL" in stderr
        wait_until(lambda: not any(map(is_alive, started)), seconds=5)


def test_a_killed_launcher_leaves_no_process(base_config: Settings, tmp_path: Path) -> None:
    with running(base_config, tmp_path, data=2) as process:
        started = descendants(process.pid)
        assert len(started) >= 2  # the trainers, and maybe the verifier's worker
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, started)), seconds=5)
