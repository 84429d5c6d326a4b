"""Defines the settings of each algorithm of `megatron-oreal train`, and what each needs from a run. Imports no torch.

To add an algorithm, write its section here and name it in AnyAlgorithm; algorithms/README.md lists the other two steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.effects import Effects, choice, condition, never, positive
from megatron_oreal.config.models import CriticConfig, RewardModelConfig, ScalarModelConfig
from megatron_oreal.config.rollout import RolloutConfig
from megatron_oreal.config.section import Section


@dataclass(frozen=True, slots=True)
class SampleNeeds:
    """The requirements of an algorithm on the groups that it trains on.

    Example: pure rejection sampling with algorithm.num_correct=2 has SampleNeeds(num_correct=2).
    """

    num_correct: int = 0  # Each prompt should have this many correct samples; the run samples prompts with fewer again.
    # The run should replace groups that are all correct or all incorrect, because training skips them.
    needs_mixed: bool = False


class AlgorithmConfig(Section):
    """The settings that every algorithm has. Each algorithm has a subclass with a `name` and its own settings."""

    name: str  # The algorithm; its section has the settings below.
    min_group_size: ClassVar[int] = 1
    takes_importance_weights: ClassVar[bool] = True  # whether it corrects for samples of an older policy
    takes_any_reward: ClassVar[bool] = False  # whether rewards may be numbers other than 0 and 1
    # When settings of other sections act with this algorithm. The conditions receive the whole TrainConfig.
    run_effects: ClassVar[Effects] = ()

    @property
    def sample_needs(self) -> SampleNeeds:
        return SampleNeeds()

    @property
    def uses_reference(self) -> bool:
        """Says whether the algorithm holds a reference model: the frozen initial policy or a teacher."""
        return False

    @property
    def reference_path(self) -> Path | None:
        """Returns the directory of the reference model; None means the initial policy."""
        return None

    def check_rollout(self, rollout: RolloutConfig) -> None:
        """Raises ValueError for a setting that conflicts with the settings of the rollouts."""

    @property
    def scalar_models(self) -> dict[str, ScalarModelConfig]:
        """Returns the sections of the models that the algorithm trains besides the policy, by name: {"critic": ...}."""
        return {name: value for name, value in self if isinstance(value, ScalarModelConfig)}


class OrealConfig(AlgorithmConfig):
    """The settings of OREAL. The defaults are those of the published code; `preset` chooses them or the paper's."""

    name: Literal["oreal"] = "oreal"
    # Selects the defaults of the published code (reference) or of the paper.
    preset: Literal["reference", "paper"] = "reference"
    # The reward values from which advantages are computed.
    rewards: Literal["plus_minus_one", "zero_one"] = "plus_minus_one"
    # How advantages are computed from the rewards of a group.
    advantage: Literal["leave_one_out", "grpo"] = "leave_one_out"
    # The samples to train on: one correct and one incorrect sample of each mixed group (one_pair), all samples of mixed
    # groups, or all samples.
    selection: Literal["one_pair", "mixed", "all"] = "one_pair"
    positive_weight: Literal["advantage", "one"] = "advantage"  # The weight of a correct sample.
    # The weight of an incorrect sample; one_minus_pass_rate uses the pass rate of its group.
    negative_weight: Literal["advantage", "one_minus_pass_rate", "one"] = "advantage"
    # Token weights use the mean of the scores up to the token instead of the token's own score.
    prefix_mean: bool = True
    # Takes a token's score at the position that predicts it, or at its own position.
    score_position: Literal["before", "at"] = "before"
    # How token weights are computed from scores.
    token_weights: Literal["threshold", "top_k", "mean_one"] = "threshold"
    top_k_ratio: float = Field(default=0.25, gt=0, le=1)  # top_k keeps this share of a sequence's tokens.
    negative_coef: float = Field(default=0.5, ge=0)  # The weight of the incorrect samples' loss (eta).
    # What divides the losses: the numbers of correct, incorrect and all tokens (the code), or of sequences (eq. 11).
    denominators: Literal["tokens", "sequences"] = "tokens"
    kl_kind: Literal["k3", "mse"] = "k3"  # The estimator of the KL divergence.
    # The KL divergence is to the frozen initial policy, or to the policy at the start of the step.
    kl_target: Literal["initial", "old"] = "initial"
    kl_coef: float = Field(default=0.01, ge=0)  # The weight of the KL divergence in the loss.
    policy_freeze_steps: int = Field(default=10, ge=0)  # The number of first steps for the reward model only.
    # The policy's learning rate schedule advances while the policy is frozen, so that its warm-up passes meanwhile.
    freeze_advances_schedule: bool = True
    filter_overlong: bool = False  # Samples cut at the length limit count in pass rates, but training skips them.
    reward_model: RewardModelConfig = RewardModelConfig()  # The token-level reward model.

    min_group_size: ClassVar[int] = 2
    effects: ClassVar[Effects] = (
        (
            ("rewards", "advantage"),
            condition(
                lambda oreal: oreal.positive_weight == "advantage" or oreal.negative_weight == "advantage",
                "where {at}positive_weight and {at}negative_weight take no advantage: drop it, or set one of "
                "them to advantage",
            ),
        ),
        (("negative_weight",), positive("negative_coef")),
        (
            ("prefix_mean", "score_position", "token_weights", "top_k_ratio"),
            choice("reward_model.enabled", True),
        ),
        (
            ("policy_freeze_steps",),
            condition(
                lambda oreal: oreal.reward_model.enabled,
                "for {at}reward_model.enabled=false: drop it, or set it to 0, or {at}reward_model.enabled to true",
            ),
        ),
        (
            ("freeze_advances_schedule",),
            condition(
                lambda oreal: oreal.reward_model.enabled and oreal.policy_freeze_steps > 0,
                "for a policy that is never frozen: drop it, or raise {at}policy_freeze_steps",
            ),
        ),
        (("top_k_ratio",), choice("token_weights", "top_k")),
        (("kl_kind", "kl_target"), positive("kl_coef")),
    )
    run_effects: ClassVar[Effects] = (
        (
            ("algorithm.kl_target",),
            condition(
                lambda run: (
                    run.algorithm.kl_target == "initial" or run.policy.updates_per_step > 1 or not run.has_fresh_ratios
                ),
                "(old) for a single update of the policy, which is its own old policy: drop it, or raise "
                "policy.updates_per_step",
            ),
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return OREAL_PRESETS.get(str(settings.get("preset")), {}) | settings

    @model_validator(mode="after")
    def fill_without_reward_model(self) -> Self:
        if not self.reward_model.enabled:
            for name in PRESETS_WITHOUT_REWARD_MODEL[self.preset].keys() - self.model_fields_set:
                setattr(self, name, self.default_of(name))
        return self

    def default_of(self, name: str) -> Any:
        """Returns the preset's choice, or the default if the preset makes none."""
        choices = OREAL_PRESETS[self.preset]
        if not self.reward_model.enabled:
            choices = choices | PRESETS_WITHOUT_REWARD_MODEL[self.preset]
        return choices.get(name, super().default_of(name))

    def value_before(self, name: str) -> Any:
        return False if name == "freeze_advances_schedule" else super().value_before(name)

    @property
    def sample_needs(self) -> SampleNeeds:
        return SampleNeeds(needs_mixed=self.selection != "all")

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0 and self.kl_target == "initial"


OREAL_PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},  # the defaults
    "paper": {
        "rewards": "zero_one",
        "advantage": "leave_one_out",
        "selection": "one_pair",
        "positive_weight": "one",
        "negative_weight": "one_minus_pass_rate",
        "prefix_mean": False,
        "score_position": "at",
        "token_weights": "threshold",
        "kl_kind": "k3",
        "kl_target": "initial",
        "policy_freeze_steps": 0,
        "freeze_advances_schedule": False,
    },
}
# The choices of a preset when reward_model.enabled is false. The published code has a configuration for that case.
PRESETS_WITHOUT_REWARD_MODEL: dict[str, dict[str, Any]] = {
    "reference": {"selection": "all", "policy_freeze_steps": 0},
    "paper": {},
}


class PpoConfig(AlgorithmConfig):
    """The settings of Open-Reasoner-Zero's PPO: several critic updates, then one on-policy update of the policy."""

    name: Literal["ppo"]
    discount: float = Field(default=1.0, gt=0, le=1)  # The discount factor of later rewards (gamma).
    # The lambda of GAE: 1 uses the whole return, 0 only the next value.
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    clip_low: float = Field(default=0.2, gt=0, le=1)  # The ratio is clipped to [1 - clip_low, 1 + clip_high].
    clip_high: float = Field(default=0.2, gt=0)  # The upper bound of the same interval.
    # The largest change of a value in one step; null does not clip.
    value_clip: float | None = Field(default=0.2, gt=0)
    whiten_advantages: bool = True  # Normalises advantages to mean 0 and variance 1 over the step's tokens.
    policy_minibatches: PositiveInt = 1  # The number of policy optimizer steps in an epoch over the step's samples.
    policy_epochs: PositiveInt = 1  # The number of policy epochs over the step's samples.
    critic_minibatches: PositiveInt = 12  # The number of critic optimizer steps in an epoch over the step's samples.
    critic_epochs: PositiveInt = 1  # The number of critic epochs over the step's samples.
    kl_kind: Literal["k3", "mse"] = "k3"  # The estimator of the KL divergence in the loss.
    kl_coef: float = Field(default=0.0, ge=0)  # The weight of the KL to the initial policy in the loss.
    kl_reward_coef: float = Field(default=0.0, ge=0)  # The weight of the same KL as a penalty in each token's reward.
    entropy_coef: float = Field(default=0.0, ge=0)  # The weight of the entropy bonus.
    policy_freeze_steps: int = Field(default=0, ge=0)  # The number of first steps that train only the critic.
    filter_overlong: bool = False  # Training of policy and critic skips samples cut at the length limit.
    critic: CriticConfig = CriticConfig()  # The model that predicts the return.

    takes_any_reward: ClassVar[bool] = True
    effects: ClassVar[Effects] = (
        (("kl_kind",), positive("kl_coef")),
        (
            ("value_clip",),
            condition(
                lambda ppo: ppo.critic_minibatches * ppo.critic_epochs > 1,
                "for a single update of the critic, before which no value has moved: drop it, or raise "
                "{at}critic_minibatches or {at}critic_epochs",
            ),
        ),
    )
    run_effects: ClassVar[Effects] = (
        (
            ("algorithm.clip_low", "algorithm.clip_high"),
            condition(
                lambda run: (
                    run.algorithm.policy_minibatches * run.algorithm.policy_epochs > 1 or not run.has_fresh_ratios
                ),
                "for a single update of the policy, whose ratio is 1: drop it, or raise algorithm.policy_minibatches "
                "or algorithm.policy_epochs, or set rollout.old_logprobs to engine",
            ),
        ),
        (
            ("policy.updates_per_step",),
            never("for algorithm.name=ppo: drop it, or set algorithm.policy_minibatches or algorithm.policy_epochs"),
        ),
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        fine, coarse = sorted((self.critic_minibatches, self.policy_minibatches), reverse=True)
        if fine % coarse:
            raise ValueError(
                f"algorithm.critic_minibatches={self.critic_minibatches} and algorithm.policy_minibatches="
                f"{self.policy_minibatches}: one must divide the other"
            )
        return self

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0 or self.kl_reward_coef > 0


OBJECTIVE_OPTIONS: dict[str, tuple[str, ...]] = {  # the objectives that use each option
    "h": ("expression",),
    "smoothing": ("expression",),
    "n": ("pass_at_n",),
    "std": ("grpo",),
    "epsilon": ("grpo",),
    "baseline": ("pass_at_n", "logit", "expression"),
    "num_correct": ("pure_rejection_sampling",),
}


SINGLE_UPDATE_WORDS = (
    "for a single update of the policy, whose ratio is 1: drop it, or raise policy.updates_per_step, or set "
    "rollout.old_logprobs to engine"
)


class OutcomeConfig(AlgorithmConfig):
    """The settings of any objective h(p) of the pass rate p, on a weighted log-prob loss: GRPO, Dr. GRPO, DAPO, ..."""

    name: Literal["outcome"]
    # The objective. pure_rejection_sampling trains on the first num_correct correct samples of each group.
    objective: Literal[
        "reinforce",
        "rloo",
        "rejection_sampling",
        "pure_rejection_sampling",
        "grpo",
        "pass_at_n",
        "logit",
        "expression",
        "distillation",  # Rewards are unused; distill_coef or kl_coef defines the loss.
    ] = "grpo"
    h: str = ""  # The function h(t) of objective=expression, where t is the pass rate, for example "log(t / (1 - t))".
    # Keeps expression's h finite at t = 0 and t = 1, e.g. 1/(2 group_size).
    smoothing: float = Field(default=0.0, ge=0)
    n: PositiveInt = 2  # The n of pass_at_n; a larger n gives less weight to prompts that are often solved.
    # The standard deviation that divides grpo's advantages; none: Dr. GRPO.
    std: Literal["population", "bessel", "none"] = "population"
    epsilon: float = Field(default=0.0, ge=0)  # The number that grpo adds to the standard deviation.
    # leave_one_out has the same mean as none, and less variance.
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"
    # The number of correct samples that pure_rejection_sampling takes from each group (B).
    num_correct: PositiveInt = 1
    dynamic_sampling: bool = False  # Training skips groups that are all correct or all incorrect.
    whiten_advantages: bool = False  # Normalises weights to mean 0 and variance 1 over the step's tokens (REINFORCE++).
    filter_overlong: bool = False  # Samples cut at the length limit count in advantages, but training skips them.
    # DAPO's soft overlong penalty: over the last overlong_tokens before the length limit, a sample's reward falls
    # linearly by overlong_penalty. 0 applies no penalty.
    overlong_tokens: int = Field(default=0, ge=0)
    # The largest amount that the penalty subtracts from a reward of 0 or 1.
    overlong_penalty: float = Field(default=1.0, gt=0)
    # How the loss averages: each sequence's mean over its tokens (GRPO), the mean over all tokens (DAPO), or each
    # sequence's sum divided by constant_tokens (Dr. GRPO; with 1, exactly the gradient of h). All three also count
    # samples of weight 0.
    normalisation: Literal["sequence", "token", "constant"] = "token"
    constant_tokens: PositiveInt = 1  # The divisor of normalisation=constant, for example rollout.max_new_tokens.
    # The importance ratio of each token, or of its whole sequence (GSPO).
    ratio: Literal["token", "sequence"] = "token"
    # The lower bound of the ratio is 1 - clip_low; null does not clip.
    clip_low: float | None = Field(default=0.2, gt=0, le=1)
    # The upper bound of the ratio is 1 + clip_high, 0.28 for DAPO; null does not clip.
    clip_high: float | None = Field(default=0.2, gt=0)
    # How the loss uses the ratio: PPO's clipped objective, or log-probs weighted with the clipped ratio, which keeps
    # every token's gradient (CISPO).
    surrogate: Literal["clip", "cispo"] = "clip"
    # How the loss treats the few tokens whose log-prob and weight have the largest covariance, because these reduce the
    # entropy most: it does nothing, drops some of them at random (Clip-Cov), or adds a KL to the old policy (KL-Cov).
    covariance: Literal["none", "clip", "kl"] = "none"
    covariance_share: float = Field(default=2e-4, gt=0, le=1)  # The share of the step's tokens that this selects.
    covariance_low: float = 1.0  # Clip-Cov selects among the tokens above this covariance.
    covariance_high: float = 5.0  # Clip-Cov selects among the tokens below this covariance.
    covariance_coef: float = Field(default=1.0, gt=0)  # The weight of |log ratio| in KL-Cov.
    kl_kind: Literal["k3", "mse"] = "k3"  # The estimator of the KL divergence.
    kl_coef: float = Field(default=0.0, ge=0)  # The weight of the KL to the reference, as a mean over tokens.
    # The weight of log(reference / old policy), which the loss adds to each token's weight. This is distillation on the
    # policy's own samples, with a teacher as the reference.
    distill_coef: float = Field(default=0.0, ge=0)
    # The Hugging Face directory of a teacher, which replaces the initial policy as the reference. It must have the same
    # tokens and may have another size.
    teacher: Path | None = None

    effects: ClassVar[Effects] = (
        *(((name,), choice("objective", *objectives)) for name, objectives in OBJECTIVE_OPTIONS.items()),
        (("overlong_tokens",), choice("objective", "reinforce", "rloo", "grpo")),
        (("overlong_penalty",), positive("overlong_tokens")),
        (("covariance_share",), choice("covariance", "clip", "kl")),
        (("covariance_low", "covariance_high"), choice("covariance", "clip")),
        (("covariance_coef",), choice("covariance", "kl")),
        (
            ("teacher",),
            condition(
                lambda outcome: outcome.uses_reference,
                "for {at}distill_coef=0 and {at}kl_coef=0: drop it, or raise one of them",
            ),
        ),
        (
            ("dynamic_sampling", "covariance", "whiten_advantages"),
            condition(
                lambda outcome: outcome.objective != "distillation",
                "for {at}objective=distillation, where no reward counts: drop it",
            ),
        ),
        (
            ("whiten_advantages",),
            condition(
                lambda outcome: outcome.objective != "pure_rejection_sampling",
                "for {at}objective=pure_rejection_sampling, whose weights are all 1: drop it",
            ),
        ),
        (("epsilon",), choice("std", "population", "bessel")),
        (("constant_tokens",), choice("normalisation", "constant")),
        (("kl_kind",), positive("kl_coef")),
    )
    run_effects: ClassVar[Effects] = (
        (
            ("algorithm.clip_low", "algorithm.clip_high", "algorithm.surrogate"),
            condition(
                lambda run: run.policy.updates_per_step > 1 or not run.has_fresh_ratios,
                SINGLE_UPDATE_WORDS,
            ),
        ),
        (
            ("algorithm.covariance",),
            condition(
                lambda run: (
                    run.algorithm.covariance != "kl" or run.policy.updates_per_step > 1 or not run.has_fresh_ratios
                ),
                SINGLE_UPDATE_WORDS,
            ),
        ),
    )

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.objective == "expression" and not self.h.strip():
            raise ValueError("algorithm.h is required for algorithm.objective=expression: set h, e.g. log(t + 0.1)")
        if self.objective == "distillation" and not self.uses_reference:
            raise ValueError(
                "algorithm.objective=distillation learns from the reference alone: raise algorithm.distill_coef or "
                "algorithm.kl_coef"
            )
        if self.covariance_low >= self.covariance_high:
            raise ValueError(
                f"algorithm.covariance_low={self.covariance_low:g} must be below algorithm.covariance_high="
                f"{self.covariance_high:g}: lower it"
            )
        self.refuse_idle_settings("algorithm.")
        return self

    def check_rollout(self, rollout: RolloutConfig) -> None:
        if self.overlong_tokens > rollout.max_new_tokens:
            raise ValueError(
                f"algorithm.overlong_tokens={self.overlong_tokens} must be <= rollout.max_new_tokens="
                f"{rollout.max_new_tokens}, for it counts back from the length limit: lower it"
            )

    @property
    def sample_needs(self) -> SampleNeeds:
        is_pure = self.objective == "pure_rejection_sampling"
        return SampleNeeds(self.num_correct if is_pure else 0, self.dynamic_sampling)

    @property
    def uses_reference(self) -> bool:
        return self.kl_coef > 0 or self.distill_coef > 0

    @property
    def reference_path(self) -> Path | None:
        return self.teacher


# To add an algorithm, add its section to this union and its row to ALGORITHMS in algorithms/registry.py.
AnyAlgorithm = OrealConfig | OutcomeConfig | PpoConfig
ALGORITHM_SECTIONS: dict[str, type[AlgorithmConfig]] = {
    get_args(section.model_fields["name"].annotation)[0]: section for section in get_args(AnyAlgorithm)
}
