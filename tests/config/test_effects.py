"""A setting that is given and has no effect is refused, and so is nothing else. One case for each row of the tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_oreal.config import EvalRunConfig, ModelRunConfig, SftConfig, TrainConfig, load_config, to_yaml
from megatron_oreal.config.algorithms import AlgorithmConfig
from megatron_oreal.config.section import Section

FILES: dict[type[ModelRunConfig], str] = {
    TrainConfig: "run_dir: a\nnum_steps: 3\nmodel: {path: m}\ndata: {prompts: p}\n",
    SftConfig: "run_dir: a\nnum_steps: 3\nmodel: {path: m}\ndata: {examples: e}\neval: {prompts: {a: a}}\n",
    EvalRunConfig: "run_dir: a\nmodel: {path: m}\neval: {prompts: {a: a}}\n",
}


@dataclass
class Case:
    given: str  # the setting, in the spelling of the command line
    idle: list[str] = field(default_factory=list)  # with these it has no effect
    acting: list[str] | None = field(default_factory=list)  # with these it has one; None: it never has
    kind: type[ModelRunConfig] = TrainConfig


PPO, OUTCOME, HELD_OUT = "algorithm.name=ppo", "algorithm.name=outcome", "eval.prompts.a=a"
OWN_FUNCTION, OWN_SERVER = "verifier.function='package.module:function'", "verifier.url='http://a/rewards'"
NO_REWARD_MODEL = ["algorithm.reward_model.enabled=false", "algorithm.policy_freeze_steps=0"]
ONE = ["algorithm.positive_weight=one", "algorithm.negative_weight=one"]
OBJECTIVES = {name: f"algorithm.objective={name}" for name in ("expression", "pass_at_n", "pure_rejection_sampling")}
ALWAYS, TOKEN_MASK = "rollout.corrects=always", "rollout.mask_level=token"
CLIP_COV, KL_COV = "algorithm.covariance=clip", "algorithm.covariance=kl"
DISTILL = ["algorithm.objective=distillation", "algorithm.distill_coef=1"]
STALE = ["rollout.engine=sglang", "rollout.staleness=1"]
# (section, setting) -> a case for each of its rows
CASES: dict[tuple[str, str], list[Case]] = {
    ("OptimizerConfig", "min_lr"): [
        Case(f"{at}.optimizer.min_lr=1e-7", [], [f"{at}.optimizer.decay=cosine"])
        for at in ("policy", "algorithm.reward_model")
    ]
    + [
        Case("algorithm.critic.optimizer.min_lr=1e-7", [PPO], [PPO, "algorithm.critic.optimizer.decay=cosine"]),
        Case("policy.optimizer.min_lr=1e-7", [], ["policy.optimizer.decay=cosine"], SftConfig),
    ],
    ("OptimizerConfig", "decay_steps"): [
        Case("policy.optimizer.decay_steps=3", [], [f"policy.optimizer.decay={decay}"])
        for decay in ("cosine", "linear")
    ],
    ("PromptConfig", "system_prompt"): [
        Case("data.system_prompt=x", ["data.format=template", "data.template='{prompt}'"], ["data.format=plain"])
    ],
    ("CheckpointConfig", "keep_best"): [
        Case("checkpoint.keep_best=2", [], ["checkpoint.best_metric=eval/a/greedy", "eval.prompts.a=a"])
    ],
    ("CheckpointConfig", "best_metric"): [
        Case(
            "checkpoint.best_metric=eval/a/greedy", ["checkpoint.keep_best=0", "eval.prompts.a=a"], ["eval.prompts.a=a"]
        )
    ],
    ("TrainConfig", "rollout.draw_rounds"): [
        Case("rollout.draw_rounds=2", [], [OUTCOME, OBJECTIVES["pure_rejection_sampling"]]),
        Case("rollout.draw_rounds=2", [PPO], None),
        Case("rollout.draw_rounds=2", [OUTCOME], None),
    ],
    ("TrainConfig", "rollout.importance_cap"): [
        Case("rollout.importance_cap=3", ["rollout.engine=sglang"], ["rollout.engine=sglang", "rollout.staleness=1"]),
        Case("rollout.importance_cap=3", [PPO], [PPO, "rollout.engine=sglang", "rollout.unfinished=resume"]),
        Case("rollout.importance_cap=3", [], [ALWAYS]),
    ],
    **{
        ("TrainConfig", f"rollout.{name}"): [Case(f"rollout.{name}={value}", [], [ALWAYS, *with_mask])]
        for name, value, with_mask in (
            ("correction", "icepop", []),
            ("importance_level", "sequence", []),
            ("mask_level", "geometric", []),
            ("mask_low", 0.5, [TOKEN_MASK]),
            ("mask_high", 3, [TOKEN_MASK]),
            ("mask_veto", 0.1, []),
        )
    },
    ("TrainConfig", "rollout.old_logprobs"): [
        Case("rollout.old_logprobs=engine", [], [ALWAYS]),
        Case("rollout.old_logprobs=engine", [*STALE, "rollout.temperature=0.5"], STALE),
    ],
    ("TrainConfig", "rollout.corrects"): [
        Case(ALWAYS, ["rollout.engine=sglang", "rollout.temperature=0.5"], ["rollout.temperature=0.5"]),
    ],
    ("RolloutConfig", "loss_support"): [
        Case("rollout.loss_support=sampled", [], ["rollout.top_p=0.9"]),
        Case("rollout.loss_support=sampled", ["rollout.top_p=1"], ["rollout.top_k=5"]),
    ],
    ("CorrectionSettings", "importance_level"): [
        Case("rollout.importance_level=sequence", [ALWAYS, "rollout.importance_cap=null"], [ALWAYS]),
        Case("rollout.importance_level=sequence", [ALWAYS, "rollout.old_logprobs=engine"], None),
    ],
    ("CorrectionSettings", "importance_cap"): [
        Case("rollout.importance_cap=3", [ALWAYS, "rollout.old_logprobs=engine"], [ALWAYS]),
    ],
    ("CorrectionSettings", "mask_low"): [Case("rollout.mask_low=0.5", [ALWAYS], [ALWAYS, TOKEN_MASK])],
    ("CorrectionSettings", "mask_high"): [Case("rollout.mask_high=3", [ALWAYS], [ALWAYS, TOKEN_MASK])],
    ("OrealConfig", "rewards"): [
        Case("algorithm.rewards=zero_one", ONE, ["algorithm.positive_weight=one"]),
        Case("algorithm.rewards=plus_minus_one", ["algorithm.preset=paper"], None),
    ],
    ("OrealConfig", "advantage"): [Case("algorithm.advantage=grpo", ONE)],
    ("OrealConfig", "negative_weight"): [Case("algorithm.negative_weight=one", ["algorithm.negative_coef=0"])],
    ("OrealConfig", "prefix_mean"): [
        Case("algorithm.prefix_mean=false", NO_REWARD_MODEL),
        Case("algorithm.prefix_mean=true", [*NO_REWARD_MODEL, "algorithm.preset=paper"], ["algorithm.preset=paper"]),
    ],
    ("OrealConfig", "score_position"): [Case("algorithm.score_position=at", NO_REWARD_MODEL)],
    ("OrealConfig", "token_weights"): [Case("algorithm.token_weights=mean_one", NO_REWARD_MODEL)],
    ("OrealConfig", "top_k_ratio"): [
        Case("algorithm.top_k_ratio=0.5", [], ["algorithm.token_weights=top_k"]),
        Case("algorithm.top_k_ratio=0.5", NO_REWARD_MODEL, None),
    ],
    ("OrealConfig", "policy_freeze_steps"): [
        Case("algorithm.policy_freeze_steps=3", ["algorithm.reward_model.enabled=false"]),
    ],
    ("OrealConfig", "freeze_advances_schedule"): [
        Case("algorithm.freeze_advances_schedule=false", ["algorithm.policy_freeze_steps=0"]),
        Case("algorithm.freeze_advances_schedule=false", ["algorithm.reward_model.enabled=false"]),
        Case(
            "algorithm.freeze_advances_schedule=true",
            ["algorithm.preset=paper"],
            ["algorithm.preset=paper", "algorithm.policy_freeze_steps=3"],
        ),
    ],
    ("OrealConfig", "kl_kind"): [Case("algorithm.kl_kind=mse", ["algorithm.kl_coef=0"])],
    ("OrealConfig", "kl_target"): [
        Case(
            "algorithm.kl_target=old",
            ["algorithm.kl_coef=0", "policy.updates_per_step=2"],
            ["policy.updates_per_step=2"],
        ),
        Case(
            "algorithm.kl_target=old",
            ["algorithm.kl_coef=0", "policy.updates_per_step=2", "algorithm.preset=paper"],
            ["policy.updates_per_step=2", "algorithm.preset=paper"],
        ),
    ],
    ("OrealConfig", "algorithm.kl_target"): [Case("algorithm.kl_target=old", [], ["policy.updates_per_step=2"])],
    ("PpoConfig", "kl_kind"): [
        Case("algorithm.kl_kind=mse", [PPO, "algorithm.kl_reward_coef=1"], [PPO, "algorithm.kl_coef=1"])
    ],
    ("PpoConfig", "algorithm.clip_low"): [Case("algorithm.clip_low=0.1", [PPO], [PPO, "algorithm.policy_epochs=2"])],
    ("PpoConfig", "algorithm.clip_high"): [
        Case("algorithm.clip_high=0.1", [PPO], [PPO, "algorithm.policy_minibatches=2"])
    ],
    ("PpoConfig", "value_clip"): [Case("algorithm.value_clip=0.1", [PPO, "algorithm.critic_minibatches=1"], [PPO])],
    ("PpoConfig", "policy.updates_per_step"): [Case("policy.updates_per_step=2", [PPO], [OUTCOME])],
    ("OutcomeConfig", "h"): [Case("algorithm.h=t", [OUTCOME], [OUTCOME, OBJECTIVES["expression"]])],
    ("OutcomeConfig", "smoothing"): [
        Case("algorithm.smoothing=0.1", [OUTCOME], [OUTCOME, OBJECTIVES["expression"], "algorithm.h=t"])
    ],
    ("OutcomeConfig", "n"): [Case("algorithm.n=3", [OUTCOME], [OUTCOME, OBJECTIVES["pass_at_n"]])],
    ("OutcomeConfig", "std"): [Case("algorithm.std=none", [OUTCOME, "algorithm.objective=rloo"], [OUTCOME])],
    ("OutcomeConfig", "epsilon"): [
        Case("algorithm.epsilon=0.1", [OUTCOME, "algorithm.objective=rloo"], [OUTCOME]),
        Case("algorithm.epsilon=0.1", [OUTCOME, "algorithm.std=none"], [OUTCOME, "algorithm.std=bessel"]),
    ],
    ("OutcomeConfig", "baseline"): [Case("algorithm.baseline=none", [OUTCOME], [OUTCOME, OBJECTIVES["pass_at_n"]])],
    ("OutcomeConfig", "num_correct"): [
        Case("algorithm.num_correct=2", [OUTCOME], [OUTCOME, OBJECTIVES["pure_rejection_sampling"]])
    ],
    ("OutcomeConfig", "constant_tokens"): [
        Case("algorithm.constant_tokens=9", [OUTCOME], [OUTCOME, "algorithm.normalisation=constant"])
    ],
    ("OutcomeConfig", "overlong_tokens"): [
        Case("algorithm.overlong_tokens=9", [OUTCOME, "algorithm.objective=logit"], [OUTCOME]),
    ],
    ("OutcomeConfig", "overlong_penalty"): [
        Case("algorithm.overlong_penalty=0.5", [OUTCOME], [OUTCOME, "algorithm.overlong_tokens=9"]),
    ],
    ("OutcomeConfig", "covariance_share"): [
        Case("algorithm.covariance_share=0.1", [OUTCOME], [OUTCOME, CLIP_COV]),
    ],
    ("OutcomeConfig", "covariance_low"): [Case("algorithm.covariance_low=0.5", [OUTCOME], [OUTCOME, CLIP_COV])],
    ("OutcomeConfig", "covariance_high"): [Case("algorithm.covariance_high=9", [OUTCOME], [OUTCOME, CLIP_COV])],
    ("OutcomeConfig", "covariance_coef"): [
        Case("algorithm.covariance_coef=2", [OUTCOME, CLIP_COV], [OUTCOME, KL_COV, "policy.updates_per_step=2"]),
    ],
    ("OutcomeConfig", "algorithm.covariance"): [
        Case(KL_COV, [OUTCOME], [OUTCOME, "policy.updates_per_step=2"]),
        Case(KL_COV, [OUTCOME], [OUTCOME, ALWAYS, "rollout.old_logprobs=engine"]),
    ],
    ("OutcomeConfig", "algorithm.surrogate"): [
        Case("algorithm.surrogate=cispo", [OUTCOME], [OUTCOME, "policy.updates_per_step=2"]),
        Case("algorithm.surrogate=cispo", [OUTCOME], [OUTCOME, ALWAYS, "rollout.old_logprobs=engine"]),
    ],
    ("OutcomeConfig", "teacher"): [
        Case("algorithm.teacher=t", [OUTCOME], [OUTCOME, "algorithm.distill_coef=1"]),
        Case("algorithm.teacher=t", [OUTCOME], [OUTCOME, "algorithm.kl_coef=1"]),
    ],
    ("OutcomeConfig", "covariance"): [Case(CLIP_COV, [OUTCOME, *DISTILL], [OUTCOME])],
    ("OutcomeConfig", "dynamic_sampling"): [Case("algorithm.dynamic_sampling=true", [OUTCOME, *DISTILL], [OUTCOME])],
    ("OutcomeConfig", "whiten_advantages"): [
        Case("algorithm.whiten_advantages=true", [OUTCOME, *DISTILL], [OUTCOME]),
        Case("algorithm.whiten_advantages=true", [OUTCOME, OBJECTIVES["pure_rejection_sampling"]], [OUTCOME]),
    ],
    ("OutcomeConfig", "kl_kind"): [Case("algorithm.kl_kind=mse", [OUTCOME], [OUTCOME, "algorithm.kl_coef=0.1"])],
    **{
        ("OutcomeConfig", f"algorithm.{name}"): [
            Case(f"algorithm.{name}=0.28", [OUTCOME], [OUTCOME, "policy.updates_per_step=2"])
        ]
        for name in ("clip_low", "clip_high")
    },
    **{
        (kind.__name__, f"rollout.{name}"): [Case(f"rollout.{name}={value}", ["rollout.engine=sglang"], None, kind)]
        for kind in (SftConfig, EvalRunConfig)
        for name, value in {
            "group_size": 3,
            "draw_rounds": 3,
            "prompt_rounds": 3,
            "staleness": 3,
            "importance_cap": 3,
            "correction": "icepop",
            "corrects": "always",
            "importance_level": "sequence",
            "mask_level": "token",
            "mask_low": 0.5,
            "mask_high": 3,
            "mask_veto": 0.1,
            "old_logprobs": "engine",
            "oversampling": 3,
            "unfinished": "resume",
            "loss_support": "sampled",
            "ledger": "false",
            "only": "true",
            "mismatch_limit": 3,
        }.items()
    },
    **{
        (kind.__name__, f"rollout.{name}"): [Case(f"rollout.{name}={value}", ["eval.num_samples=0"], [], kind)]
        for kind in (SftConfig, EvalRunConfig)
        for name, value in {"temperature": 0.6, "top_p": 0.9, "top_k": 20}.items()
    },
    ("EvalRunConfig", "model.recompute"): [Case("model.recompute=full", [], None, EvalRunConfig)],
    ("EvalRunConfig", "model.fp8"): [Case("model.fp8=tensorwise", [], None, EvalRunConfig)],
    ("EvalRunConfig", "model.fp8_bf16_ends"): [Case("model.fp8_bf16_ends=1", ["model.fp8=mxfp8"], None, EvalRunConfig)],
    ("ModelConfig", "recompute_modules"): [
        Case("model.recompute_modules=[core_attn]", [], ["model.recompute=selective"])
    ],
    ("ModelConfig", "head_fp8"): [
        Case("model.head_fp8=transformer_engine_tensor", [], ["model.head_precision=fp8_grad"])
    ],
    ("ModelConfig", "head_backend"): [Case("model.head_backend=liger", ["model.head_precision=fp8_grad"], [])],
    ("EvalRunConfig", "model.head_backend"): [Case("model.head_backend=own", [], None, EvalRunConfig)],
    ("EvalRunConfig", "model.head_precision"): [Case("model.head_precision=fp8_grad", [], None, EvalRunConfig)],
    ("EvalRunConfig", "model.head_fp8"): [
        Case("model.head_fp8=transformer_engine_tensor", ["model.head_precision=fp8_grad"], None, EvalRunConfig)
    ],
    ("JudgeConfig", "audit_overrules"): [
        Case("verifier.judge.audit_overrules=true", [], ["verifier.judge.audit_share=0.1"])
    ],
    ("JudgeConfig", "system_prompt"): [Case("verifier.judge.system_prompt=x", ["verifier.judge.api=completions"], [])],
    **{
        ("VerifierConfig", name): [Case(f"verifier.{name}={value}", [idle], [], TrainConfig) for idle in given]
        for name, value, given in (
            ("max_timeouts", "3", (OWN_FUNCTION, OWN_SERVER)),
            ("answer_rule", "conclusion", (OWN_FUNCTION, OWN_SERVER)),
            ("num_workers", "3", (OWN_SERVER,)),
            ("cpu_seconds", "1", (OWN_SERVER,)),
        )
    },
    ("VerifierConfig", "rewards"): [Case("verifier.rewards=any", [PPO], [PPO, OWN_FUNCTION])],
    ("VerifierConfig", "correct_from"): [
        Case("verifier.correct_from=0.5", [OWN_FUNCTION], [PPO, OWN_FUNCTION, "verifier.rewards=any"])
    ],
    ("VerifierConfig", "function_memory_gib"): [Case("verifier.function_memory_gib=4", [], [OWN_FUNCTION])],
    ("MachineAlarms", "slow_phase_seconds"): [
        Case("alarms.slow_phase_seconds=3", ["alarms.slow_phase=null"], [], kind) for kind in (TrainConfig, SftConfig)
    ],
    ("EvalRunConfig", "parallel.microbatch_tokens"): [Case("parallel.microbatch_tokens=9", [], None, EvalRunConfig)],
}


def load(folder: Path, kind: type[ModelRunConfig], overrides: list[str]) -> ModelRunConfig:
    file = folder / "config.yaml"
    file.write_text(FILES[kind])
    return load_config(kind, file, overrides)


def sections(kind: type[Section] = Section) -> set[type[Section]]:
    found = {subclass for subclass in kind.__subclasses__() if subclass.__module__.startswith("megatron_oreal.")}
    return found | {subclass for section in found for subclass in sections(section)}


def test_each_row_of_the_tables_has_a_case() -> None:
    rows = set()
    for section in sections():
        own = section.__dict__.get("effects", ())
        if issubclass(section, AlgorithmConfig):
            own += section.__dict__.get("run_effects", ())
        rows |= {(section.__name__, setting) for settings, _ in own for setting in settings}
    assert rows == set(CASES)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{name}-{setting}") for (name, setting), cases in CASES.items() for case in cases],
)
def test_a_setting_without_effect_is_refused_by_name(tmp_path: Path, case: Case) -> None:
    name = case.given.partition("=")[0]
    with pytest.raises(ValueError) as raised:
        load(tmp_path, case.kind, [*case.idle, case.given])
    message = str(raised.value)
    assert "\n" not in message and ": drop it" in message
    # Where other settings were given that have no effect either, one of them may be named.
    assert message.startswith(f"{name} has no meaning ") or case.kind is EvalRunConfig
    if case.acting is not None:
        config = load(tmp_path, case.kind, [*case.acting, case.given])
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_config(case.kind, tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.top_k_ratio=0.25", "algorithm.kl_coef=0", "algorithm.kl_kind=k3"],  # the defaults
        ["algorithm.preset=paper", "algorithm.kl_coef=0", "algorithm.kl_target=initial"],  # the preset's
        [*NO_REWARD_MODEL, "algorithm.preset=paper", "algorithm.prefix_mean=false"],
        [*NO_REWARD_MODEL, "algorithm.reward_model.optimizer.lr=1e-3"],  # of a section that is switched off
        ["rollout.sglang.num_servers=2", "eval.every=3"],
        ["rollout.engine=sglang", "rollout.batch_size=3"],
        [OUTCOME, "algorithm.clip_low=null", "algorithm.clip_high=null", "rollout.importance_cap=null"],
        [PPO, "algorithm.critic_minibatches=1", "algorithm.value_clip=null"],
        ["checkpoint.keep_best=0", "rollout.prompt_rounds=2"],
    ],
    ids=" ".join,
)
def test_what_asks_for_nothing_is_not_refused(tmp_path: Path, overrides: list[str]) -> None:
    load(tmp_path, TrainConfig, overrides)


def test_a_greedy_evaluation_may_say_that_it_is_greedy(tmp_path: Path) -> None:
    load(tmp_path, EvalRunConfig, ["rollout.temperature=0", "eval.num_samples=0"])
    load(tmp_path, SftConfig, ["rollout.temperature=0", "eval.num_samples=0"])
    with pytest.raises(ValueError, match=r"^rollout\.top_p has no meaning for eval\.num_samples=0, which is greedy"):
        load(tmp_path, EvalRunConfig, ["rollout.temperature=0", "rollout.top_p=0.9", "eval.num_samples=0"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward_model.enabled=false"], "algorithm.name=oreal, write algorithm.reward_model.enabled=..."),
        (["reward_model={optimizer: {lr: 1}}"], "algorithm.name=oreal, write algorithm.reward_model.optimizer.lr=..."),
        (["reward_model="], "algorithm.name=oreal, write algorithm.reward_model=..."),
        ([PPO, "critic.head_init=normal"], "algorithm.name=ppo, write algorithm.critic.head_init=..."),
        (["critic.head_init=normal"], "algorithm.name=ppo, write algorithm.critic.head_init=..."),
    ],
)
def test_the_old_place_of_a_section_names_the_new_one(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        load(tmp_path, TrainConfig, overrides)
    name = overrides[-1].partition("=")[0].partition(".")[0]
    assert str(raised.value) == f"unknown key {name!r}: it is a section of {message}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.critic.head_init=normal"], "unknown key 'algorithm.critic'; it belongs to algorithm.name=ppo"),
        (["algorithm.gae_lambda=0.5"], "unknown key 'algorithm.gae_lambda'; it belongs to algorithm.name=ppo"),
        ([PPO, "algorithm.reward_model.enabled=false"], "unknown key 'algorithm.reward_model'; it belongs to "),
        (
            [PPO, "algorithm.critic.updates_per_step=2"],
            "unknown key 'algorithm.critic.updates_per_step'; set algorithm.critic_minibatches and algorithm.critic_ep",
        ),
        (
            ["algorithm.reward_model.optimiser.lr=1"],
            "unknown key 'algorithm.reward_model.optimiser'; did you mean",
        ),
        (["algorithm.name=grpo"], "'grpo' is an objective: write algorithm={name: outcome, objective: grpo}"),
    ],
)
def test_a_setting_of_another_algorithm_is_named_with_its_owner(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        load(tmp_path, TrainConfig, overrides)
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
