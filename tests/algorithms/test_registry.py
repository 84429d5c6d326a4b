"""The registry: which models each algorithm has built, for how many updates; and a new algorithm in one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytest
from pydantic import Field

from megatron_oreal.algorithms.losses import PolicyTerms
from megatron_oreal.algorithms.model import Metrics, Model, ModelSource
from megatron_oreal.algorithms.registry import ALGORITHMS, AlgorithmEntry
from megatron_oreal.algorithms.sample_selection import training_sequence
from megatron_oreal.config import (
    ALGORITHM_SECTIONS,
    AlgorithmConfig,
    Correction,
    HeadInit,
    SampleNeeds,
    ScalarModelConfig,
    TrainConfig,
    load_config,
)
from megatron_oreal.config.algorithms import AnyAlgorithm
from megatron_oreal.config.effects import Effects, never, positive
from megatron_oreal.data.packing import PackingPlan, pack
from megatron_oreal.types import Batch, Group, LossOutput, Message, Microbatch, Prompt, Sample, TokenOutputs, Verdict

PLAN = PackingPlan(0, 1, microbatch_tokens=1000)
FILE = "run_dir: a\nnum_steps: 10\nmodel: {path: m}\ndata: {prompts: p}\n"


@dataclass
class Source:
    """A ModelSource of models in plain torch."""

    table_model: Any
    plan: PackingPlan = PLAN
    built: dict[str, Any] = field(default_factory=dict)  # name -> what was asked for

    def policy(self, num_updates: int) -> Model:
        return self.build("policy", num_updates)

    def reference(self) -> Model:
        return self.build("reference", None)

    def scalar(self, name: str, training: ScalarModelConfig, num_updates: int, head_init: HeadInit = "zero") -> Model:
        return self.build(name, (num_updates, training.optimizer.lr, head_init))

    def build(self, name: str, wanted: Any) -> Model:
        assert name not in self.built
        self.built[name] = wanted
        model: Model = self.table_model(name, {10: -1.0, 11: -2.0, 12: -1.0})
        return model


def load(folder: Path, *overrides: str, kind: type[TrainConfig] = TrainConfig) -> TrainConfig:
    (folder / "config.yaml").write_text(FILE)
    return load_config(kind, folder / "config.yaml", overrides)


def test_every_algorithm_of_the_configuration_has_a_row() -> None:
    assert {name: entry.config for name, entry in ALGORITHMS.items()} == ALGORITHM_SECTIONS
    assert set(ALGORITHM_SECTIONS.values()) == set(get_args(AnyAlgorithm))


@pytest.mark.parametrize(
    ("overrides", "built"),
    [
        # 10 steps; the policy is frozen in the first 10, and its learning rate moves on meanwhile.
        ([], {"policy": 10, "reward_model": (10, 1e-6, "zero"), "reference": None}),
        (
            ["algorithm.policy_freeze_steps=3", "policy.updates_per_step=2", "algorithm.kl_target=old"],
            {"policy": 20, "reward_model": (10, 1e-6, "zero")},
        ),
        (
            [
                "algorithm.policy_freeze_steps=3",
                "policy.updates_per_step=2",
                "algorithm.freeze_advances_schedule=false",
            ],
            {"policy": 14, "reward_model": (10, 1e-6, "zero"), "reference": None},
        ),
        # The policy has one update at least.
        (
            ["algorithm.freeze_advances_schedule=false"],
            {"policy": 1, "reward_model": (10, 1e-6, "zero"), "reference": None},
        ),
        (
            ["algorithm.preset=paper", "algorithm.policy_freeze_steps=3"],
            {"policy": 7, "reward_model": (10, 1e-6, "zero"), "reference": None},
        ),
        (
            ["algorithm.reward_model={updates_per_step: 4, optimizer: {lr: 1.0}}", "algorithm.kl_coef=0"],
            {"policy": 10, "reward_model": (40, 1.0, "zero")},
        ),
        (
            ["algorithm.reward_model.enabled=false", "algorithm.policy_freeze_steps=0"],
            {"policy": 10, "reference": None},
        ),
        (["algorithm.name=ppo"], {"policy": 10, "critic": (120, 1e-6, "zero")}),
        (
            [
                "algorithm={name: ppo, policy_epochs: 2, policy_minibatches: 3, policy_freeze_steps: 1}",
                "algorithm.kl_reward_coef=1",
                "algorithm.critic={head_init: normal, optimizer: {lr: 2.0}}",
            ],
            {"policy": 54, "critic": (120, 2.0, "normal"), "reference": None},
        ),
        (["algorithm.name=outcome", "policy.updates_per_step=3"], {"policy": 30}),
        (["algorithm.name=outcome", "algorithm.kl_coef=0.1"], {"policy": 10, "reference": None}),
    ],
)
def test_the_models_that_an_algorithm_has_built(
    table_model: Any, tmp_path: Path, overrides: list[str], built: dict[str, Any]
) -> None:
    config, source = load(tmp_path, *overrides), Source(table_model)
    entry = ALGORITHMS[config.algorithm.name]
    entry.build(config.algorithm, config, source)
    assert source.built == built
    assert set(source.built) - {"reference"} <= set(entry.trains)


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        ([], SampleNeeds(0, needs_mixed=True)),
        (["algorithm.selection=mixed"], SampleNeeds(0, needs_mixed=True)),
        (["algorithm.selection=all"], SampleNeeds(0, needs_mixed=False)),
        (["algorithm.reward_model.enabled=false"], SampleNeeds(0, needs_mixed=False)),
        (["algorithm.reward_model.enabled=false", "algorithm.preset=paper"], SampleNeeds(0, needs_mixed=True)),
        (["algorithm.name=ppo"], SampleNeeds(0, needs_mixed=False)),
        (["algorithm.name=outcome"], SampleNeeds(0, needs_mixed=False)),
        (["algorithm={name: outcome, dynamic_sampling: true}"], SampleNeeds(0, needs_mixed=True)),
        (
            ["algorithm={name: outcome, objective: pure_rejection_sampling, num_correct: 3}"],
            SampleNeeds(3, needs_mixed=False),
        ),
    ],
)
def test_what_an_algorithm_needs_of_the_samples(tmp_path: Path, overrides: list[str], needs: SampleNeeds) -> None:
    assert load(tmp_path, *overrides).algorithm.sample_needs == needs


# A new algorithm: its configuration, the algorithm itself, and its row.


class ToyConfig(AlgorithmConfig):
    """Pulls the log-probs of correct samples up, and asks a judge about them."""

    name: Literal["toy"]
    strength: float = 1.0
    judge_coef: float = 0.0
    judge: ScalarModelConfig = ScalarModelConfig()

    takes_importance_weights: ClassVar[bool] = False
    effects: ClassVar[Effects] = ((("judge",), positive("judge_coef")),)
    run_effects: ClassVar[Effects] = (
        (("policy.updates_per_step",), never("for algorithm.name=toy: drop it, or raise algorithm.strength")),
    )

    @property
    def sample_needs(self) -> SampleNeeds:
        return SampleNeeds(num_correct=1)


@dataclass
class Toy:
    config: ToyConfig
    plan: PackingPlan
    policy: Model
    correction: Correction | None

    @classmethod
    def build(cls, config: ToyConfig, run: TrainConfig, models: ModelSource) -> Toy:
        return cls(config, models.plan, models.policy(run.num_steps), run.correction)

    def update(self, groups: Sequence[Group], _step: int) -> Metrics:
        correct = [sample for group in groups for sample in group.judged_samples if sample.is_correct]
        batch = pack([training_sequence(sample, self.config.strength) for sample in correct], self.plan)
        return self.policy.train_step(batch, partial(self.loss, batch=batch), keep="old_logprobs")

    def planned_updates(self, _step: int) -> dict[str, int]:
        return {"policy": 1}

    def loss(self, outputs: TokenOutputs, microbatch: Microbatch, batch: Batch) -> LossOutput:
        terms = PolicyTerms(outputs, microbatch, batch, self.correction)
        return terms.output(
            -terms.mean(terms.ratio * terms.corrected(microbatch.advantages)), {"entropy": terms.entropy()}
        )


class RunOfToys(TrainConfig):
    """What TrainConfig is once AnyAlgorithm names ToyConfig."""

    algorithm: AnyAlgorithm | ToyConfig = Field(discriminator="name")  # type: ignore[assignment]


def test_a_new_algorithm_is_a_section_a_class_and_a_row(
    table_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "toy", AlgorithmEntry(ToyConfig, ("policy",), Toy.build))
    monkeypatch.setitem(ALGORITHM_SECTIONS, "toy", ToyConfig)
    toy = "algorithm={name: toy, strength: 2}"
    config = load(tmp_path, toy, "rollout.draw_rounds=3", kind=RunOfToys)
    assert config.algorithm.sample_needs.num_correct == 1
    assert config.algorithm.scalar_models == {"judge": ScalarModelConfig()}
    source = Source(table_model)
    algorithm = ALGORITHMS[config.algorithm.name].build(config.algorithm, config, source)
    assert source.built == {"policy": 10}
    samples = [
        Sample("", [1], tokens, "", [], [-0.5] * len(tokens), "stop", 0, Verdict(0.0, status, None))  # type: ignore[arg-type]
        for tokens, status in (([10, 11], "correct"), ([12], "incorrect"))
    ]
    metrics = algorithm.update([Group(Prompt("", (Message("user", ""),), ""), samples)], 0)
    assert metrics["policy/loss"] == pytest.approx(-2.0)  # ratio 1, strength 2, the mean over two tokens
    assert algorithm.policy.gradients == [pytest.approx({10: -1.0, 11: -1.0})]  # type: ignore[attr-defined]
    assert metrics["policy/mismatch"] == pytest.approx((0.5 + 1.5) / 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["policy.updates_per_step=2"], "policy.updates_per_step has no meaning for algorithm.name=toy: drop it, or "),
        (
            ["algorithm.judge.optimizer.lr=1"],
            "algorithm.judge.optimizer.lr has no meaning for algorithm.judge_coef=0: ",
        ),
        (
            ["rollout.importance_cap=3", "rollout.engine=sglang", "rollout.staleness=1"],
            "rollout.importance_cap has no meaning for an algorithm that does not correct for the age of samples: drop",
        ),
        (["algorithm.critic.head_init=normal"], "unknown key 'algorithm.critic'; it belongs to algorithm.name=ppo"),
        (["algorithm.strenght=1"], "unknown key 'algorithm.strenght'; did you mean 'strength'?"),
    ],
)
def test_a_new_algorithms_settings_are_checked_like_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setitem(ALGORITHM_SECTIONS, "toy", ToyConfig)
    with pytest.raises(ValueError) as raised:
        load(tmp_path, "algorithm.name=toy", *overrides, kind=RunOfToys)
    assert str(raised.value).startswith(message)
