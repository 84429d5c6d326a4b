"""Which run directory may be used: settings and files that may change, those that may not, and folders of the user."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megatron_oreal.config import EvalRunConfig, TrainConfig, to_yaml
from megatron_oreal.run import input_files
from megatron_oreal.run.input_files import digest_of_file, digest_of_lines
from megatron_oreal.run.run_directory import CHANGEABLE_IN_EVAL, check_run_dir, keep_users_files, open_run_directory

Files = dict[Path, bytes]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"id": "a"}\n{"id": "b"}\n')
    write_model(tmp_path / "model", 1.0)
    return tmp_path


def write_model(folder: Path, value: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.full(8, value, dtype=np.float32)}, folder / "model.safetensors")


def configured(root: Path, **settings: Any) -> TrainConfig:
    base: dict[str, Any] = {
        "run_dir": root / "run",
        "num_steps": 4,
        "model": {"path": root / "model"},
        "data": {"prompts": root / "prompts.jsonl"},
    }
    for name, value in settings.items():
        base[name] = base.get(name, {}) | value if isinstance(value, dict) else value
    return TrainConfig.model_validate(base)


def start(config: TrainConfig) -> list[str]:
    """Begins or resumes a run, and ends it; returns what it logs."""
    with open_run_directory(config, is_main=True) as directory:
        directory.write(config)
        return directory.notes


def contents(folder: Path) -> Files:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(config: TrainConfig) -> str:
    """The message of a start that is refused, which leaves the folder as it was."""
    before = contents(config.run_dir)
    with pytest.raises(ValueError) as raised:
        start(config)
    assert contents(config.run_dir) == before
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel": {"microbatch_tokens": 512}},
        {"parallel": {"data": 2}},
        {"parallel": {"tensor": 2, "pipeline": 2}},
        {"parallel": {"timeout_seconds": 60}},
        {"eval": {"every": 5, "num_samples": 4}},
        {"checkpoint": {"every": 1, "export_hf": False}},
        {"rollout": {"ledger": False}},
        {"alarms": {"mismatch": 0.5}},
        {"verifier": {"num_workers": 1}},
        {"num_steps": 9},
        {"num_steps": 2},
    ],
)
def test_settings_that_do_not_change_the_result_may_change(root: Path, settings: dict[str, Any]) -> None:
    assert start(configured(root)) == []
    (note,) = start(configured(root, **settings))
    assert note.startswith("settings changed since the run began: ")
    assert all(name in note for name in settings) and "\n" not in note
    assert start(configured(root, **settings)) == []


def test_a_judge_may_move_but_not_appear(root: Path) -> None:
    here = {"url": "http://a/v1", "model": "m"}
    start(configured(root, verifier={"judge": here}))
    moved = configured(
        root, verifier={"judge": here | {"url": "http://b/v1", "timeout_seconds": 9, "api_key_env": "K"}}
    )
    (note,) = start(moved)
    assert "verifier.judge.url: 'http://a/v1' -> 'http://b/v1'" in note
    for judge, difference in (
        (here | {"model": "other"}, "verifier.judge.model: 'm' -> 'other'"),
        (here | {"audit_share": 0.5}, "verifier.judge.audit_share: 0.0 -> 0.5"),
        (here | {"extra": {"seed": 1}}, "verifier.judge.extra.seed: None -> 1"),
        ({"model": "m"}, "verifier.judge.url: 'http://b/v1' -> ''"),
    ):
        assert difference in refusal(configured(root, verifier={"judge": judge}))
    assert "verifier.url: '' -> 'http://c'" in refusal(configured(root, verifier={"url": "http://c"}))


@pytest.mark.parametrize(
    "settings", [{"model": {"recompute": "full"}}, {"policy": {"optimizer": {"overlap_grad_reduce": False}}}]
)
def test_what_was_left_to_the_device_may_be_said(root: Path, settings: dict[str, Any]) -> None:
    """Before it was auto: there is no other value to tell of."""
    assert start(configured(root)) == []
    assert start(configured(root, **settings)) == []


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"seed": 1}, "(seed: 0 -> 1); choose another run_dir, or restore these settings to resume (they change what"),
        ({"rollout": {"batch_size": 16}}, "(rollout.batch_size: 512 -> 16)"),
        ({"data": {"prompts_per_step": 8}}, "(data.prompts_per_step: 64 -> 8)"),
        ({"policy": {"optimizer": {"lr": 1e-5}}}, "(policy.optimizer.lr: 1e-06 -> 1e-05)"),
    ],
)
def test_settings_that_change_the_result_are_refused(root: Path, settings: dict[str, Any], difference: str) -> None:
    start(configured(root))
    assert difference in refusal(configured(root, **settings))


def test_a_longer_cosine_says_why(root: Path) -> None:
    cosine = {"optimizer": {"decay": "cosine"}}
    start(configured(root, policy=cosine))
    message = refusal(configured(root, policy=cosine, num_steps=6))
    assert "(num_steps: 4 -> 6)" in message and "(the decay of a learning rate without" in message
    fixed = {"optimizer": {"decay": "cosine", "decay_steps": 4}}
    start(configured(root, run_dir=root / "other", policy=fixed))
    start(configured(root, run_dir=root / "other", policy=fixed, num_steps=6))


def test_fewer_steps_than_the_newest_checkpoint_are_refused(root: Path) -> None:
    start(configured(root))
    (root / "run" / "checkpoints" / "step_000003").mkdir(parents=True)
    message = refusal(configured(root, num_steps=2))
    assert message.startswith(f"num_steps=2: {root / 'run'} already has a checkpoint of step 3; raise num_steps to 3")
    start(configured(root, num_steps=3))


def test_moved_files_and_folders_are_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(configured(root))
    monkeypatch.chdir(root)
    start(configured(root, model={"path": "model"}, data={"prompts": "./run/../prompts.jsonl"}))
    for name in ("run", "model", "prompts.jsonl"):
        (root / name).rename(root / f"moved_{name}")
    moved = configured(
        root,
        run_dir=root / "moved_run",
        model={"path": root / "moved_model", "tokenizer": root / "moved_model"},
        data={"prompts": root / "moved_prompts.jsonl"},
    )
    (note,) = start(moved)
    assert "data.prompts: 'run/../prompts.jsonl' -> " in note and "model.path: 'model' ->" in note


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / "prompts.jsonl").write_text('{"id": "b"}\n{"id": "a"}\n'),
            "data.prompts: the prompts in {root}/prompts.jsonl are not those that {root}/run began with; restore them, "
            "choose another run_dir, or remove {root}/run/inputs.json to go on with what is there now",
        ),
        (
            lambda root: write_model(root / "model", 2.0),
            "model.path: the initial weights in {root}/model are not those that {root}/run began with "
            "(model.safetensors); restore",
        ),
        (
            lambda root: (root / "model" / "tokenizer.json").write_text("{ }"),
            "model.tokenizer: the tokenizer in {root}/model are not those that",
        ),
        (
            lambda root: (root / "model" / "chat_template.jinja").write_text("{{ messages }}"),
            "model.tokenizer: the tokenizer in {root}/model are not those that {root}/run began with (chat_",
        ),
        (
            lambda root: write_model(root / "critic", 2.0),
            "algorithm.reward_model.path: the initial weights in {root}/critic are not those that",
        ),
    ],
    ids=["prompts", "weights", "tokenizer", "chat template", "reward model"],
)
def test_changed_files_are_refused(root: Path, change: Any, message: str) -> None:
    write_model(root / "critic", 1.0)
    config = configured(root, algorithm={"reward_model": {"path": root / "critic"}})
    start(config)
    assert start(config) == []
    change(root)
    assert message.format(root=root) in refusal(config)
    (root / "run" / "inputs.json").unlink()
    start(config)


def test_a_run_of_an_older_version_gets_its_fingerprints(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(to_yaml(configured(root, model={"path": "model"})))
    write_model(root / "elsewhere", 1.0)
    assert "(model.path: 'model' -> " in refusal(configured(root, model={"path": root / "elsewhere"}))
    start(configured(root))  # The same folder, spelled otherwise.
    assert set(json.loads((root / "run" / "inputs.json").read_text())) == {
        "algorithm.reward_model.path", "data.prompts", "model.path", "model.tokenizer",
    }  # fmt: skip
    start(configured(root, model={"path": root / "elsewhere"}))


def test_damaged_fingerprints_are_one_line(root: Path) -> None:
    start(configured(root))
    (root / "run" / "inputs.json").write_text("{")
    assert "inputs.json is damaged; remove it to resume" in refusal(configured(root))


@pytest.mark.parametrize("name", ["hf/model.safetensors", "weights/mine/a", "notes.txt", "checkpoints/step_000001/a"])
def test_a_folder_of_the_user_is_refused(root: Path, name: str) -> None:
    file = root / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    message = refusal(configured(root))
    assert message.startswith(f"run_dir: {root / 'run'} is not a run's: it holds {name.split('/')[0]} and no")


@pytest.mark.parametrize("text", ["a: [", "- a\n", "name: mine\n", "\xff"])
def test_a_configuration_of_something_else_is_refused(root: Path, text: str) -> None:
    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(text, encoding="latin-1")
    assert "is not a run's: no run has written its config.yaml; give another folder" in refusal(configured(root))


def test_an_empty_folder_and_what_comes_before_a_run_are_accepted(root: Path) -> None:
    (root / "run" / "servers").mkdir(parents=True)
    for name in ("servers.json", "slurm-1.out", "servers/server_0.log", ".config.yaml.12.ab.tmp"):
        (root / "run" / name).write_text("")
    start(configured(root))


def test_only_one_run_at_a_time(root: Path) -> None:
    with open_run_directory(configured(root), is_main=True):
        assert f"is in use by process {os.getpid()} on " in refusal(configured(root))
    assert contents(root / "run") == {}


def test_evaluations_keep_what_their_answers_depend_on(root: Path) -> None:
    def evaluation(**settings: Any) -> EvalRunConfig:
        return EvalRunConfig.model_validate(
            {"run_dir": root / "run", "model": {"path": root / "model"}, "eval": {"prompts": {"a": "a"}} | settings}
        )

    (root / "run").mkdir()
    (root / "run" / "config.yaml").write_text(to_yaml(evaluation()))
    assert check_run_dir(evaluation(confidence=0.9, prompts={"a": "a", "b": "b"}), CHANGEABLE_IN_EVAL)
    for settings in ({"num_samples": 4}, {"greedy": False}, {"max_prompts": 3}):
        with pytest.raises(ValueError, match="belongs to another configuration"):
            check_run_dir(evaluation(**settings), CHANGEABLE_IN_EVAL)


def test_home_directories_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = configured(
        Path("~"),
        model={"tokenizer": "~/t"},
        algorithm={"reward_model": {"path": "~/r"}},
        eval={"prompts": {"a": "~/a"}},
        rollout={"sglang": {"python": "~/python", "endpoints_file": "~/e"}},
    )
    assert home.run_dir == tmp_path / "run" and home.model.path == tmp_path / "model"
    assert home.model.tokenizer == tmp_path / "t" and home.eval.prompts == {"a": tmp_path / "a"}
    assert home.algorithm.scalar_models["reward_model"].path == tmp_path / "r"
    assert home.rollout.sglang.python == tmp_path / "python" and home.data.prompts == tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match="~nobody-here/x: this system knows no home directory of ~nobody-here"):
        configured(Path("~"), run_dir="~nobody-here/x")


def test_digests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a\nb\n")
    other.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb")
    assert digest_of_lines(one) == digest_of_lines(other)
    other.write_bytes(b"b\na\n")
    assert digest_of_lines(one) != digest_of_lines(other)
    monkeypatch.setattr(input_files, "WHOLE_BYTES", 2**21)
    size = 2**21 + 2**20
    digests = set()
    for position in (None, 0, 2**20 + 1024 * 7, size - 1):  # Each lies in a part that is read.
        content = bytearray(size)
        if position is not None:
            content[position] = 1
        one.write_bytes(content)
        digests.add(digest_of_file(one))
    one.write_bytes(bytes(size + 1))
    assert len(digests | {digest_of_file(one)}) == 5


def test_an_export_keeps_the_users_files(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    keep_users_files(out)
    write_model(out, 1.0)
    keep_users_files(out)
    assert out.is_dir()
    (out / "notes.txt").write_text("mine")
    keep_users_files(out)
    assert not out.exists() and (tmp_path / "hf.kept_1" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mine", ["adapter.safetensors", "model-mine.safetensors", "optimizer.pt", "link", "folder"])
def test_an_export_keeps_what_looks_like_a_models(tmp_path: Path, mine: str) -> None:
    out = tmp_path / "hf"
    write_model(out, 1.0)
    (out / "model-00001-of-00002.safetensors").write_text("ours")
    keep_users_files(out)
    assert out.is_dir()
    if mine == "folder":
        (out / "config.json").unlink()
        (out / "config.json").mkdir()
    elif mine == "link":
        (out / "tokenizer.json").unlink()
        (out / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    else:
        (out / mine).write_text("mine")
    keep_users_files(out)
    assert not out.exists() and len([*(tmp_path / "hf.kept_1").iterdir()]) >= 4


def test_an_export_keeps_a_file_of_the_user(tmp_path: Path) -> None:
    out = tmp_path / "hf"
    (tmp_path / "hf.kept_1").symlink_to(tmp_path / "nowhere")
    out.write_text("mine")
    keep_users_files(out)
    assert not out.exists() and (tmp_path / "hf.kept_2").read_text() == "mine"
