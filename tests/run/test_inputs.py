"""Which folder of an earlier run may be continued: config.yaml of the run, perhaps of an older version, is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal.config import SftConfig, TrainConfig, to_yaml
from megatron_oreal.data.tokenizer import load_tokenizer
from megatron_oreal.run.inputs import check_initial_weights, check_teacher
from megatron_oreal.run.run_directory import check_run_dir
from megatron_oreal.weights.families import read_architecture
from tests.support.tiny_models import write_tiny_model
from tests.support.tiny_task import VOCABULARY, write_tokenizer

PPO = {"name": "ppo", "critic": {"optimizer": {"lr": 5e-6}}}
OUTCOME = {"name": "outcome", "objective": "rloo"}
# What `reward_model` and `critic` of the resolved configuration held when they stood at its top.
OLD_REWARD_MODEL = {
    "optimizer": {"lr": 1e-6, "decay": "constant"},
    "updates_per_step": 1,
    "enabled": True,
    "path": None,
}
OLD_CRITIC = {"optimizer": {"lr": 1e-6}, "updates_per_step": 1, "path": None, "head_init": "zero"}


def configured(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig.model_validate(
        {"run_dir": folder, "num_steps": 3, "model": {"path": "m"}, "data": {"prompts": "p"}} | settings
    )


def begin(config: TrainConfig | SftConfig, change: Any = None) -> dict[str, Any]:
    """Writes config.yaml as a run does; `change` turns it into that of an older version."""
    settings: dict[str, Any] = yaml.safe_load(to_yaml(config))
    if change is not None:
        settings = change(settings) or settings
    (config.run_dir / "config.yaml").write_text(yaml.safe_dump(settings))
    return settings


def refusal(config: TrainConfig | SftConfig) -> str:
    with pytest.raises(ValueError) as raised:
        check_run_dir(config)
    message = str(raised.value)
    assert "\n" not in message
    return message


def at_the_top(settings: dict[str, Any]) -> dict[str, Any]:
    """The places of revisions whose reward_model and critic were sections of every run."""
    algorithm = dict(settings["algorithm"])
    reward_model = algorithm.pop("reward_model", OLD_REWARD_MODEL)
    critic = OLD_CRITIC | algorithm.pop("critic", {})
    return settings | {"algorithm": algorithm, "reward_model": reward_model, "critic": critic}


@pytest.mark.parametrize("algorithm", [{}, PPO, OUTCOME], ids=["oreal", "ppo", "outcome"])
def test_the_same_configuration_resumes(tmp_path: Path, algorithm: dict[str, Any]) -> None:
    config = configured(tmp_path, algorithm=algorithm)
    begin(config)
    check_run_dir(config)
    begin(config, at_the_top)
    check_run_dir(config)


@pytest.mark.parametrize(
    ("algorithm", "name", "difference"),
    [
        (
            {"reward_model": {"optimizer": {"lr": 2e-6}}},
            "reward_model",
            "algorithm.reward_model.optimizer.lr: 1e-06 ->",
        ),
        (PPO, "critic", "algorithm.critic.optimizer.lr: 1e-06 -> 5e-06"),
    ],
)
def test_a_change_in_a_section_that_moved_is_seen(
    tmp_path: Path, algorithm: dict[str, Any], name: str, difference: str
) -> None:
    config = configured(tmp_path, algorithm=algorithm)
    begin(config, lambda settings: at_the_top(settings) | {name: OLD_CRITIC if name == "critic" else OLD_REWARD_MODEL})
    assert f"belongs to another configuration ({difference}" in refusal(config)


def test_a_setting_that_did_not_exist_has_its_default(tmp_path: Path) -> None:
    def older(settings: dict[str, Any]) -> None:
        del settings["model"]["head_fp8"], settings["rollout"]["importance_cap"], settings["parallel"]
        del settings["eval"], settings["algorithm"]["reward_model"]["path"], settings["policy"]["optimizer"]["eps"]

    config = configured(tmp_path)
    begin(config, older)
    check_run_dir(config)
    changed = configured(tmp_path, parallel={"tensor": 2}, policy={"optimizer": {"eps": 1e-6}})
    message = refusal(changed)
    assert "(policy.optimizer.eps: 1e-08 -> 1e-06); choose another run_dir" in message  # a layout may change
    with_prompts = configured(tmp_path, eval={"prompts": {"a": "a.jsonl"}})
    assert check_run_dir(with_prompts) == ["settings changed since the run began: eval.prompts.a: None -> 'a.jsonl'"]


def test_the_default_of_a_missing_choice_is_the_presets(tmp_path: Path) -> None:
    def older(settings: dict[str, Any]) -> None:
        del settings["algorithm"]["score_position"]

    begin(configured(tmp_path, algorithm={"preset": "paper"}), older)
    check_run_dir(configured(tmp_path, algorithm={"preset": "paper"}))
    message = refusal(configured(tmp_path, algorithm={"preset": "paper", "score_position": "before"}))
    assert "(algorithm.score_position: 'at' -> 'before')" in message


def test_a_run_from_before_a_setting_keeps_what_it_did(tmp_path: Path) -> None:
    """Frozen steps once left the schedule alone: such a run goes on only if it is told to do so still."""

    def older(settings: dict[str, Any]) -> None:
        del settings["algorithm"]["freeze_advances_schedule"], settings["algorithm"]["denominators"]

    begin(configured(tmp_path), older)
    assert "(algorithm.freeze_advances_schedule: False -> True)" in refusal(configured(tmp_path))
    check_run_dir(configured(tmp_path, algorithm={"freeze_advances_schedule": False}))
    for algorithm in ({"preset": "paper", "policy_freeze_steps": 3}, {"policy_freeze_steps": 0}):
        begin(configured(tmp_path, algorithm=algorithm), older)
        check_run_dir(configured(tmp_path, algorithm=algorithm))


def test_a_run_without_reward_model_from_before_its_own_choices(tmp_path: Path) -> None:
    """It trained on pairs, and its freeze of 10 steps had no effect."""

    def older(settings: dict[str, Any]) -> None:
        del settings["algorithm"]["freeze_advances_schedule"]
        settings["algorithm"] |= {"selection": "one_pair", "policy_freeze_steps": 10}

    off: dict[str, Any] = {"reward_model": {"enabled": False}}
    begin(configured(tmp_path, algorithm=off), older)
    assert "(algorithm.selection: 'one_pair' -> 'all')" in refusal(configured(tmp_path, algorithm=off))
    check_run_dir(configured(tmp_path, algorithm=off | {"selection": "one_pair"}))


def test_a_missing_setting_without_a_default_is_a_difference(tmp_path: Path) -> None:
    def older(settings: dict[str, Any]) -> None:
        del settings["data"]["prompts"]

    config = configured(tmp_path)
    begin(config, older)
    assert "(data.prompts: None -> 'p')" in refusal(config)
    (tmp_path / "config.yaml").write_text("")
    assert "data.prompts: None -> 'p'; model.path: None -> 'm'" in refusal(config)


def test_a_setting_that_no_longer_exists_is_a_difference(tmp_path: Path) -> None:
    config = configured(tmp_path)
    begin(config, lambda settings: settings | {"curriculum": {"stages": 3}})
    assert "(curriculum.stages: 3 -> None)" in refusal(config)


def test_settings_without_effect_may_be_dropped(tmp_path: Path) -> None:
    """An older version accepted and ignored them; now they have to leave the file, and the run goes on."""

    def older(settings: dict[str, Any]) -> dict[str, Any]:
        settings["policy"] |= {"updates_per_step": 4}
        settings["policy"]["optimizer"] |= {"min_lr": 1e-7}
        settings["rollout"] |= {"draw_rounds": 3, "importance_cap": 5.0}
        settings["algorithm"]["critic"] |= {"updates_per_step": 7}
        return at_the_top(settings)

    config = configured(tmp_path, algorithm=PPO)
    begin(config, older)
    check_run_dir(config)
    busy = configured(tmp_path, algorithm={"name": "outcome"})
    assert "policy.updates_per_step: 4 -> 1" in refusal(busy)


def test_supervised_runs_resume_too(tmp_path: Path) -> None:
    def older(settings: dict[str, Any]) -> None:
        del settings["data"]["max_tokens"], settings["rollout"]["stop_strings"]

    settings = {"run_dir": tmp_path, "num_steps": 3, "model": {"path": "m"}, "data": {"examples": "e"}}
    config = SftConfig.model_validate(settings)
    begin(config, older)
    check_run_dir(config)


def test_a_longer_cosine_is_another_schedule_where_it_stands_now(tmp_path: Path) -> None:
    for decay in ("cosine", "linear"):
        decaying = {"reward_model": {"optimizer": {"decay": decay}}}
        begin(configured(tmp_path, algorithm=decaying), at_the_top)
        longer = configured(tmp_path, algorithm=decaying, num_steps=4)
        assert "(num_steps: 3 -> 4)" in refusal(longer)


@pytest.mark.parametrize("name", ["reward_model", "critic"])
def test_initial_weights_of_another_model_are_named_with_their_section(tmp_path: Path, name: str) -> None:
    algorithm = {"name": "oreal" if name == "reward_model" else "ppo", name: {"path": str(tmp_path)}}
    config = configured(tmp_path, algorithm=algorithm)
    with pytest.raises(
        ValueError, match=rf"^algorithm\.{name}\.path: .* is not a Hugging Face directory of the policy's"
    ):
        check_initial_weights(config, architecture=None)  # type: ignore[arg-type]
    check_initial_weights(configured(tmp_path, algorithm={"name": "outcome"}), architecture=None)  # type: ignore[arg-type]


def test_a_teacher_is_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    tokenizer_path, policy = tmp_path / "policy", tmp_path / "policy"
    write_tokenizer(tokenizer_path)
    sizes: dict[str, Any] = {"vocab_size": len(VOCABULARY), "tied": True}
    write_tiny_model(policy, num_layers=2, **sizes)
    tokenizer, architecture = load_tokenizer(tokenizer_path), read_architecture(policy)

    def check(teacher: Path, **settings: Any) -> None:
        algorithm = {"name": "outcome", "objective": "distillation", "distill_coef": 1.0, "teacher": str(teacher)}
        run = {"model": {"path": str(policy)}, "algorithm": algorithm, "rollout": {"max_new_tokens": 8}}
        run |= {"data": {"prompts": "p", "max_prompt_tokens": 8}}
        check_teacher(configured(tmp_path / "run", **(run | settings)), architecture, tokenizer)

    check(write_tiny_model(tmp_path / "larger", num_layers=3, **(sizes | {"vocab_size": len(VOCABULARY) + 4})))
    with pytest.raises(ValueError, match=r"^algorithm\.teacher: .*config\.json does not exist; give a Hugging Face"):
        check(tmp_path / "nowhere")
    smaller = write_tiny_model(tmp_path / "smaller", num_layers=2, **(sizes | {"vocab_size": len(VOCABULARY) - 1}))
    with pytest.raises(ValueError, match=r"^algorithm\.teacher: its vocab_size=\d+ is below the policy's"):
        check(smaller)
    with pytest.raises(ValueError, match=r"^algorithm\.teacher: parallel\.pipeline=2 .* num_hidden_layers=3"):
        check(tmp_path / "larger", parallel={"pipeline": 2})
    write_tokenizer(tmp_path / "other")
    other = write_tiny_model(tmp_path / "other", num_layers=2, **sizes)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"1"', '"swap"').replace('"2"', '"1"').replace('"swap"', '"2"'))
    with pytest.raises(ValueError, match=r"^algorithm\.teacher: the tokenizer in .* is not that of"):
        check(other)
