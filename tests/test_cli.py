"""What the command line says before torch is needed: dry runs, help, and the user's mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal import cli
from tests.support.tiny_task import write_tokenizer

SHAPE = {
    "model_type": "qwen2",
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "max_position_embeddings": 128,
}
TRAIN = {
    "run_dir": "run",
    "num_steps": 3,
    "model": {"path": "model"},
    "data": {"prompts": "train.jsonl", "max_prompt_tokens": 28},
    "rollout": {"max_new_tokens": 100},
}
SFT = TRAIN | {"data": {"examples": "sft.jsonl", "max_prompt_tokens": 28, "max_tokens": 128}}


@dataclass(frozen=True, slots=True)
class Outcome:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        """The one line that a refusal is."""
        assert self.exit_code == 2, self
        assert self.stdout == ""
        assert self.stderr.startswith("Error: ") and self.stderr.count("\n") == 1, self.stderr
        return self.stderr.removeprefix("Error: ").rstrip("\n")


CommandLine = Callable[..., Outcome]


@pytest.fixture
def command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Runs `megatron-oreal ARGUMENTS` in a folder with model/config.json, train.yaml and sft.yaml."""
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(TRAIN))
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(SFT))

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["megatron-oreal", *arguments])
        exit_code = 0
        try:
            cli.main()
        except SystemExit as end:
            assert isinstance(end.code, int)
            exit_code = end.code
        captured = capfd.readouterr()
        assert not (tmp_path / "run").exists()
        return Outcome(exit_code, captured.out, captured.err)

    return run


def write_model(folder: Path, **changes: Any) -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(SHAPE | changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian", "train.yaml"], "No such command 'trian'."),
        (["train"], "Missing argument 'CONFIG'."),
        (["train", "train.yaml", "--dryrun"], "No such option '--dryrun'."),
        (["train", "none.yaml"], "none.yaml does not exist; give a YAML configuration file"),
        (["train", "model"], "model is a folder; give a YAML configuration file"),
        (
            ["train", "sft.yaml"],
            "sft.yaml is a configuration of `megatron-oreal sft`: data.prompts is required: set it",
        ),
        (["sft", "train.yaml"], "train.yaml is a configuration of `megatron-oreal train`: data.examples is required"),
        (["sft", "sft.yaml", "data.max_tokens=129"], "data.max_tokens=129 exceeds the model's max_position_embeddings"),
        (
            ["sft", "sft.yaml", "rollout.max_new_tokens=101", "eval.prompts.a=a.jsonl"],
            "data.max_prompt_tokens + rollout.max_new_tokens = 129 exceeds the model's max_position_embeddings=128",
        ),
    ],
)
def test_a_mistake_is_one_line(command_line: CommandLine, arguments: list[str], message: str) -> None:
    assert command_line(*arguments).message.startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rolout.group_size=8", "unknown key 'rolout'; did you mean 'rollout'?"),
        ("rollout.groupsize=8", "unknown key 'rollout.groupsize'; did you mean 'group_size'?"),
        ("num_steps=many", "num_steps: Input should be a valid integer"),
        ("rollout.top_p=1.5", "rollout.top_p: Input should be less than or equal to 1, got 1.5"),
        ("rollout.group_size=1", "rollout.group_size must be >= 2"),
        ("num_steps", "override 'num_steps' must read section.key=value"),
        ("seed=[1", "override 'seed=[1': '[1' is not a YAML value; quote it"),
        ("model=", "model.path is required: set it in the file or as model.path=..."),
        ("model.path=none", "model.path: none/config.json does not exist below /"),
        ("parallel.tensor=3", "parallel.tensor=3 must divide the model's num_attention_heads=8"),
        ("parallel.tensor=4", "parallel.tensor=4 must divide the model's num_key_value_heads=2"),
        ("parallel.pipeline=3", "parallel.pipeline=3 x parallel.virtual_pipeline=1 must divide the model's"),
        ("rollout.max_new_tokens=101", "data.max_prompt_tokens + rollout.max_new_tokens = 129 exceeds the model's"),
    ],
)
def test_a_wrong_setting_is_one_line(command_line: CommandLine, override: str, message: str) -> None:
    assert command_line("train", "train.yaml", override).message.startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "run_dir is required"),
        (b"- a\n- b\n", "config.yaml must hold sections and keys, not a list"),
        (b"a: [1,\nb: {", "config.yaml is not YAML: "),
        (b"a: \x00", "config.yaml is not YAML: "),
        (b"a: !!python/object:os.system {}", "config.yaml is not YAML: "),
        ("run_dir: Ergebnisse für Zürich".encode("latin-1"), "config.yaml is not UTF-8 (byte 21); save it as UTF-8"),
        (b"1: 2\n", "run_dir is required"),
    ],
)
def test_a_file_that_is_no_configuration(
    command_line: CommandLine, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    assert message in command_line("train", "config.yaml").message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "model.path: model/config.json: "),
        (b"[]", "model.path: model/config.json: "),
        (b"\xff\xfe", "model.path: model/config.json: "),
        (b'{"model_type": "qwen2"}', "model.path: model/config.json: num_hidden_layers is required"),
        (
            json.dumps(SHAPE | {"model_type": "mamba"}).encode(),
            "model.path: model_type 'mamba' is not supported; known: qwen2",
        ),
    ],
)
def test_a_model_that_cannot_be_used(command_line: CommandLine, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "model" / "config.json").write_bytes(content)
    assert command_line("train", "train.yaml").message.startswith(message)


@pytest.mark.parametrize(
    ("world_size", "message"),
    [
        ("3", "parallel.tensor=2 x parallel.pipeline=2 must divide the 3 processes started: change the layout or"),
        ("8", "parallel.data=1 but the 8 processes started make it 2: drop it"),
    ],
)
def test_a_launcher_that_does_not_fit(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, world_size: str, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("RANK", "0")
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=1"]
    assert command_line("train", "train.yaml", *layout).message.startswith(message)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.implementation=transformer_engine",
            "model.implementation=transformer_engine yet: set parallel.context",
        ),
        ("model.fp8=tensorwise", "model.fp8=tensorwise yet: set parallel.context=1"),
    ],
)
def test_what_context_parallelism_does_not_run_with(command_line: CommandLine, override: str, message: str) -> None:
    found = command_line("train", "train.yaml", "parallel.context=2", override).message
    assert found.startswith(f"parallel.context > 1 does not run with {message}")


def test_empty_sections_are_the_defaults_and_can_be_overridden(command_line: CommandLine, tmp_path: Path) -> None:
    text = yaml.safe_dump(TRAIN) + "eval:\npolicy:\n  optimizer:\nalgorithm:\ncheckpoint:\n"
    (tmp_path / "train.yaml").write_text(text)
    (tmp_path / "train.jsonl").write_text('{"id": "1", "prompt": "1+1=", "answer": "2"}\n')
    outcome = command_line("train", "train.yaml", "--dry-run", "checkpoint.every=7", "eval.prompts=")
    assert outcome.exit_code == 0, outcome.stderr
    resolved = yaml.safe_load(outcome.stdout.partition("parallel layout:")[0])
    assert resolved["eval"]["prompts"] == {}
    assert resolved["eval"]["every"] == 10
    assert resolved["policy"]["optimizer"]["lr"] == 1e-6
    assert (resolved["checkpoint"]["every"], resolved["checkpoint"]["keep_last"]) == (7, 2)


@pytest.mark.parametrize(("command", "settings"), [("train", TRAIN), ("sft", SFT)])
def test_a_dry_run_needs_no_torch(tmp_path: Path, command: str, settings: dict[str, Any]) -> None:
    write_model(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    program = (
        "import sys; sys.modules['torch'] = None\n"  # as where it is not installed
        "from megatron_oreal import cli; cli.main()\n"
        "print(sorted({'transformers', 'megatron', 'numpy'} & set(sys.modules)))"
    )
    arguments = [command, "config.yaml", "parallel.tensor=2", "parallel.pipeline=2", "--dry-run"]
    folder = Path(cli.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    resolved, layout = done.stdout.split("parallel layout: ")
    assert yaml.safe_load(resolved)["parallel"]["tensor"] == 2
    assert layout.startswith("4 processes = tensor 2 x pipeline 2 x data 1")
    assert layout.splitlines()[-3:] == [
        "model.path: qwen2, 4 layers, vocabulary of 20 tokens",
        "data: not checked, because torch is not installed here",
        "[]",
    ]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_layout_and_checks_the_data(command_line: CommandLine, tmp_path: Path) -> None:
    outcome = command_line("train", "train.yaml", "--dry-run", "model.path=models/later")
    assert (
        outcome.exit_code == 2
        and outcome.stderr == f"Error: data.prompts: train.jsonl does not exist below {tmp_path}; give a JSONL file\n"
    )
    assert "parallel layout: 1 processes" in outcome.stdout
    assert (
        "model.path: models/later does not exist yet, so the layout was not compared with the model" in outcome.stdout
    )

    (tmp_path / "train.jsonl").write_text('{"id": "1", "prompt": "1+1=", "answer": "2"}\n' * 1)
    outcome = command_line("train", "train.yaml", "--dry-run", "data.prompts_per_step=4")
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stdout.endswith(
        "data.prompts: 1 prompts, enough for 0.25 steps without repetition\n"
        "model.tokenizer: model holds no tokenizer yet, so no prompt was encoded\n"
    )

    algorithm = "algorithm={name: outcome, objective: expression, h: 'foo(t)'}"
    outcome = command_line("train", "train.yaml", "--dry-run", algorithm)
    assert outcome.exit_code == 2 and outcome.stderr.startswith("Error: algorithm.h: 'foo' at character 1 is not in")


def test_a_dry_run_shows_the_first_prompt_as_the_model_reads_it(command_line: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "1", "prompt": "1+1=", "answer": "2"}\n')
    (tmp_path / "sft.jsonl").write_text('{"prompt": "2+2=", "response": "4"}\n')
    write_tokenizer(tmp_path / "tokens")
    arguments = ["--dry-run", "model.tokenizer=tokens", "data.format=plain", "data.suffix= #1:"]
    outcome = command_line("train", "train.yaml", *arguments)
    assert outcome.exit_code == 0, outcome.stderr
    assert re.fullmatch(r"the first prompt, \d+ tokens: '1\+1= #1:'", outcome.stdout.splitlines()[-1])
    outcome = command_line("sft", "sft.yaml", *arguments)
    assert outcome.exit_code == 0 and outcome.stdout.endswith(": '2+2= #1:'\n"), outcome.stderr
    outcome = command_line("train", "train.yaml", "--dry-run", "model.tokenizer=tokens")
    assert outcome.exit_code == 2 and "chat template" in outcome.stderr, outcome.stderr


def test_help_names_the_commands(command_line: CommandLine) -> None:
    outcome = command_line("--help")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert "train" in outcome.stdout and "sft" in outcome.stdout
    assert "--dry-run" in command_line("train", "--help").stdout
    assert "Commands:" in command_line().stderr
