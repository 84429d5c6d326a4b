"""The recipes hold the published settings, and each trains for two steps with only its model and lengths replaced."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_oreal.config import EvalRunConfig, TrainConfig, load_config, to_yaml
from megatron_oreal.config.loading import flatten
from tests.support.paths import EXAMPLES
from tests.support.recipes import RECIPES, shrink, write_recipe_task

# What the published code sets, in the terms of our configuration. InternLM/OREAL, oreal/configs/*.py.
OREAL = {
    "num_steps": 90,
    "data.prompts_per_step": 64,
    "data.repeats_by_pass_rate": [[0.2, 6], [0.6, 4], [0.8, 2]],
    "rollout.group_size": 16,
    "rollout.temperature": 1.0,
    "rollout.top_p": 0.9,
    "rollout.top_k": 0,
    "rollout.max_new_tokens": 14000,
    "rollout.max_total_tokens": 16384,
    "rollout.loss_support": "all",
    "verifier.answer_rule": "conclusion",
    "verifier.require_stop": True,
    "verifier.judge.model": "Qwen/Qwen2.5-72B-Instruct",
    "verifier.judge.temperature": 0.0,
    "algorithm.name": "oreal",
    "algorithm.rewards": "plus_minus_one",
    "algorithm.advantage": "leave_one_out",
    "algorithm.positive_weight": "advantage",
    "algorithm.negative_weight": "advantage",
    "algorithm.negative_coef": 0.5,
    "algorithm.denominators": "tokens",
    "algorithm.kl_kind": "k3",
    "algorithm.kl_target": "initial",
    "algorithm.kl_coef": 0.01,
    "policy.updates_per_step": 1,
    "policy.optimizer.lr": 5e-7,
    "policy.optimizer.min_lr": 1e-7,
    "policy.optimizer.warmup_steps": 10,
    "policy.optimizer.decay": "cosine",
    "policy.optimizer.weight_decay": 0.01,
    "policy.optimizer.beta1": 0.9,
    "policy.optimizer.beta2": 0.999,
    "policy.optimizer.clip_grad": 1.0,
    "checkpoint.every": 10,
}
WITH_REWARD_MODEL = OREAL | {
    "algorithm.selection": "one_pair",
    "algorithm.policy_freeze_steps": 10,
    "algorithm.freeze_advances_schedule": True,
    "algorithm.token_weights": "threshold",
    "algorithm.prefix_mean": True,
    "algorithm.score_position": "before",
    "algorithm.reward_model.enabled": True,
    "algorithm.reward_model.optimizer.lr": 2e-6,
    "algorithm.reward_model.optimizer.min_lr": 4e-7,
    "algorithm.reward_model.optimizer.warmup_steps": 10,
    "algorithm.reward_model.optimizer.decay": "cosine",
    "algorithm.reward_model.optimizer.weight_decay": 0.01,
    "algorithm.reward_model.optimizer.clip_grad": 1.0,
}
# Open-Reasoner-Zero, playground/orz_*_ppo.py; clipping, optimizers and critic from orz/.
ORZ = {
    "data.prompts_per_step": 128,
    "data.max_prompt_tokens": 2048,
    "rollout.group_size": 64,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "rollout.max_new_tokens": 8000,
    "rollout.max_total_tokens": 8192,
    "rollout.stop_strings": ["User:", "Human:", "Assistant:", "</answer>"],
    "verifier.answer_rule": "answer_tags",
    "verifier.require_stop": True,
    "algorithm.name": "ppo",
    "algorithm.discount": 1.0,
    "algorithm.gae_lambda": 1.0,
    "algorithm.clip_low": 0.2,
    "algorithm.clip_high": 0.2,
    "algorithm.value_clip": 0.2,
    "algorithm.whiten_advantages": True,
    "algorithm.policy_minibatches": 1,
    "algorithm.policy_epochs": 1,
    "algorithm.policy_freeze_steps": 0,
    "algorithm.critic_minibatches": 12,
    "algorithm.critic_epochs": 1,
    "algorithm.kl_coef": 0.0,
    "algorithm.kl_reward_coef": 0.0,
    "algorithm.entropy_coef": 0.0,
    "algorithm.critic.optimizer.lr": 5e-6,
    "algorithm.critic.optimizer.decay": "constant",
    "algorithm.critic.optimizer.beta1": 0.9,
    "algorithm.critic.optimizer.beta2": 0.95,
    "algorithm.critic.optimizer.weight_decay": 0.0,
    "algorithm.critic.optimizer.clip_grad": 1.0,
    "policy.optimizer.lr": 1e-6,
    "policy.optimizer.beta1": 0.9,
    "policy.optimizer.beta2": 0.95,
    "policy.optimizer.weight_decay": 0.0,
    "policy.optimizer.clip_grad": 1.0,
    "eval.num_samples": 1,
    "eval.every": 10,
}
CONSTANT = {
    "algorithm.critic.head_init": "normal",
    "algorithm.critic.optimizer.warmup_steps": 50,
    "policy.optimizer.warmup_steps": 50,
    "policy.optimizer.decay": "constant",
    "checkpoint.every": 50,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "oreal_7b/config.yaml": WITH_REWARD_MODEL | {"parallel.tensor": 4, "rollout.stop_tokens": ["<|im_end|>"]},
    "oreal_32b/config.yaml": WITH_REWARD_MODEL | {"parallel.tensor": 8, "rollout.stop_tokens": ["<|im_end|>"]},
    "oreal_dsr1_7b/config.yaml": WITH_REWARD_MODEL
    | {"parallel.tensor": 4, "rollout.stop_tokens": ["<｜end▁of▁sentence｜>"], "data.system_prompt": None},
    "oreal_7b_no_reward_model/config.yaml": OREAL
    | {
        "parallel.tensor": 4,
        "rollout.stop_tokens": ["<|im_end|>"],
        "algorithm.selection": "all",
        "algorithm.policy_freeze_steps": 0,
        "algorithm.reward_model.enabled": False,
    },
    "orz_0.5b/config.yaml": ORZ | CONSTANT | {"parallel.microbatch_tokens": 10048},
    "orz_1.5b/config.yaml": ORZ | CONSTANT | {"parallel.microbatch_tokens": 10048},
    "orz_7b/config.yaml": ORZ | CONSTANT | {"parallel.microbatch_tokens": 16384},
    "orz_32b/config.yaml": ORZ
    | CONSTANT
    | {"num_steps": 1100, "parallel.microbatch_tokens": 10048, "rollout.sglang.tensor": 4},
    "orz_32b/annealing.yaml": ORZ
    | {
        "num_steps": 100,
        "policy.optimizer.decay": "linear",
        "policy.optimizer.min_lr": 3e-7,
        "policy.optimizer.warmup_steps": 0,
        "algorithm.critic.optimizer.warmup_steps": 0,
    },
    # slime, scripts/run-qwen3-32B.sh
    "grpo_qwen3_32b/config.yaml": {
        "parallel.tensor": 8,
        "parallel.pipeline": 1,
        "parallel.sequence": True,
        "parallel.microbatch_tokens": 20480,
        "model.recompute": "full",
        "data.prompts_per_step": 32,
        "rollout.group_size": 8,
        "rollout.temperature": 0.8,
        "rollout.top_p": 1.0,
        "rollout.max_new_tokens": 8192,
        "rollout.sglang.placement": "colocated",
        "rollout.sglang.tensor": 8,
        "rollout.sglang.flags.mem-fraction-static": 0.7,
        "algorithm.name": "outcome",
        "algorithm.objective": "grpo",
        "algorithm.std": "bessel",
        "algorithm.epsilon": 1e-6,
        "algorithm.normalisation": "sequence",
        "algorithm.kl_coef": 0.0,
        "policy.updates_per_step": 1,
        "policy.optimizer.lr": 1e-6,
        "policy.optimizer.decay": "constant",
        "policy.optimizer.warmup_steps": 0,
        "policy.optimizer.weight_decay": 0.1,
        "policy.optimizer.beta1": 0.9,
        "policy.optimizer.beta2": 0.98,
        "eval.every": 20,
        "checkpoint.every": 20,
    },
}
# The SHA-256 of the published texts, so that they do not stand here a second time.
TEXTS = {
    "oreal_7b": ("system_prompt", "c62fc0ae96f67b2bb9f77245fed02bb236d8cda1ffe5e75e9f0d31ca74857622"),
    "oreal_32b": ("system_prompt", "c62fc0ae96f67b2bb9f77245fed02bb236d8cda1ffe5e75e9f0d31ca74857622"),
    "oreal_7b_no_reward_model": ("system_prompt", "c62fc0ae96f67b2bb9f77245fed02bb236d8cda1ffe5e75e9f0d31ca74857622"),
    "oreal_dsr1_7b": ("template", "1202c0787ee71f69b53ce48873f964e5016e278275951ffb456926fc074fb925"),
    "orz_0.5b": ("template", "28d55a126555ba691adc1eb2fedde941b41a6c79939c14777d3b9fd01a29c56f"),
    "orz_1.5b": ("template", "28d55a126555ba691adc1eb2fedde941b41a6c79939c14777d3b9fd01a29c56f"),
    "orz_7b": ("template", "28d55a126555ba691adc1eb2fedde941b41a6c79939c14777d3b9fd01a29c56f"),
    "orz_32b": ("template", "28d55a126555ba691adc1eb2fedde941b41a6c79939c14777d3b9fd01a29c56f"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_value_is_the_published_one(name: str) -> None:
    resolved = flatten(yaml.safe_load(to_yaml(load_config(TrainConfig, EXAMPLES / name))))
    wanted = PUBLISHED[name]
    assert {setting: resolved[setting] for setting in wanted} == wanted


def test_every_recipe_is_in_the_table() -> None:
    assert PUBLISHED.keys() == set(RECIPES) - {"grpo_qwen2.5_0.5b_gsm8k/config.yaml"}  # whose settings are ours


@pytest.mark.parametrize("name", TEXTS)
def test_training_and_evaluation_use_the_published_text(name: str) -> None:
    setting, digest = TEXTS[name]
    train = load_config(TrainConfig, EXAMPLES / name / "config.yaml")
    evaluation = load_config(EvalRunConfig, EXAMPLES / name / "eval.yaml")
    for section in (train.data, evaluation.data):
        assert hashlib.sha256(str(getattr(section, setting)).encode()).hexdigest() == digest
    assert (train.rollout.max_new_tokens, train.rollout.max_total_tokens) == (
        evaluation.rollout.max_new_tokens,
        evaluation.rollout.max_total_tokens,
    )
    assert train.rollout.stop_strings == evaluation.rollout.stop_strings
    assert train.rollout.stop_tokens == evaluation.rollout.stop_tokens
    assert train.verifier.answer_rule == evaluation.verifier.answer_rule


def test_the_annealing_stage_differs_in_nothing_else() -> None:
    first, second = (
        flatten(yaml.safe_load(to_yaml(load_config(TrainConfig, EXAMPLES / "orz_32b" / file))))
        for file in ("config.yaml", "annealing.yaml")
    )
    assert {name for name in first if first[name] != second[name]} == {
        "run_dir",
        "num_steps",
        "model.path",
        "data.prompts",
        "algorithm.critic.path",
        "algorithm.critic.head_init",  # it has no meaning for a critic that is loaded
        "algorithm.critic.optimizer.warmup_steps",
        "policy.optimizer.warmup_steps",
        "policy.optimizer.decay",
        "policy.optimizer.min_lr",
        "checkpoint.every",
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_files(name: str) -> None:
    folder = (EXAMPLES / name).parent
    assert {"README.md", "config.yaml", "eval.yaml", "train.slurm"} <= {path.name for path in folder.iterdir()}
    page = (folder / "README.md").read_text()
    assert "## Memory and time" in page and "docs/memory.md" in page


def run_recipes(names: list[str], folder: Path, whole: bool) -> None:
    """Trains the recipes one after the other in one process, for two steps each."""
    write_recipe_task(folder)
    files = []
    for name in names:
        files.append(folder / f"{name.replace('/', '_')}")
        files[-1].write_text(yaml.safe_dump(shrink(yaml.safe_load((EXAMPLES / name).read_text()), folder, whole)))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.workers.recipes_worker", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for file in files:
        lines = (folder / "runs" / file.stem / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [record["step"] for record in steps] == [0, 1], file
        assert all(record["reward/mean"] is not None for record in steps), file


@pytest.mark.timeout(300)
def test_recipes_train_for_two_steps(tmp_path: Path) -> None:
    """All of them, with few samples; the slow test below has the batches as they are."""
    run_recipes(list(RECIPES), tmp_path, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_recipes_train_for_two_steps_with_their_own_batches(tmp_path: Path) -> None:
    run_recipes(["oreal_7b/config.yaml", "orz_7b/config.yaml", "grpo_qwen3_32b/config.yaml"], tmp_path, whole=True)
