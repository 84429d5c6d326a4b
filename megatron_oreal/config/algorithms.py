"""The settings of each algorithm. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.section import Section


class OrealConfig(Section):
    """What the paper and its reference code do differently: the defaults are the code's, `preset` sets the rest."""

    name: Literal["oreal"] = "oreal"
    preset: Literal["reference", "paper"] = "reference"
    rewards: Literal["plus_minus_one", "zero_one"] = "plus_minus_one"
    advantage: Literal["leave_one_out", "grpo"] = "leave_one_out"
    # Samples trained on: one correct and one incorrect of each group with both kinds, all of those groups, or all.
    selection: Literal["one_pair", "mixed", "all"] = "one_pair"
    positive_weight: Literal["advantage", "one"] = "advantage"
    negative_weight: Literal["advantage", "one_minus_pass_rate", "one"] = "advantage"
    prefix_mean: bool = True  # token weights from the mean of the scores so far, not from the token's own score
    score_position: Literal["before", "at"] = "before"  # the score beside the token that predicts, or at the token
    token_weights: Literal["threshold", "top_k", "mean_one"] = "threshold"
    top_k_ratio: float = Field(default=0.25, gt=0, le=1)  # of a sequence's tokens, for token_weights=top_k
    negative_coef: float = Field(default=0.5, ge=0)  # eta
    kl_kind: Literal["k3", "mse"] = "k3"
    kl_target: Literal["initial", "old"] = "initial"  # the frozen initial policy, or the policy at the step's start
    kl_coef: float = Field(default=0.01, ge=0)
    policy_freeze_steps: int = Field(default=10, ge=0)  # the first steps train the reward model only

    @model_validator(mode="before")
    @classmethod
    def fill_from_preset(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        return OREAL_PRESETS.get(str(settings.get("preset")), {}) | settings


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
        "kl_target": "old",
        "policy_freeze_steps": 0,
    },
}


class PpoConfig(Section):
    """Open-Reasoner-Zero's PPO: one on-policy update of the policy, several of the critic before it."""

    name: Literal["ppo"]
    discount: float = Field(default=1.0, gt=0, le=1)
    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    clip_low: float = Field(default=0.2, gt=0, le=1)  # the ratio stays in [1 - clip_low, 1 + clip_high]
    clip_high: float = Field(default=0.2, gt=0)
    value_clip: float | None = Field(default=0.2, gt=0)  # how far a value may move in a step; null: no clipping
    whiten_advantages: bool = True  # to mean 0 and variance 1 over the step's tokens
    policy_minibatches: PositiveInt = 1  # optimizer steps an epoch over the step's samples
    policy_epochs: PositiveInt = 1
    critic_minibatches: PositiveInt = 12
    critic_epochs: PositiveInt = 1
    kl_kind: Literal["k3", "mse"] = "k3"
    kl_coef: float = Field(default=0.0, ge=0)  # of the KL to the initial policy in the loss
    kl_reward_coef: float = Field(default=0.0, ge=0)  # of the same, subtracted from each token's reward
    entropy_coef: float = Field(default=0.0, ge=0)  # of the entropy bonus
    policy_freeze_steps: int = Field(default=0, ge=0)  # the first steps train the critic only

    @model_validator(mode="after")
    def check(self) -> Self:
        fine, coarse = sorted((self.critic_minibatches, self.policy_minibatches), reverse=True)
        if fine % coarse:
            raise ValueError(
                f"algorithm.critic_minibatches={self.critic_minibatches} and algorithm.policy_minibatches="
                f"{self.policy_minibatches}: one must divide the other"
            )
        return self


class OutcomeConfig(Section):
    """Any objective h(p) of the pass rate p over one weighted log-prob loss: GRPO, Dr. GRPO, DAPO, GSPO, RLOO ..."""

    name: Literal["outcome"]
    objective: Literal[
        "reinforce",
        "rloo",
        "rejection_sampling",
        "pure_rejection_sampling",  # the first num_correct correct samples of each group, equally weighted
        "grpo",
        "pass_at_n",
        "logit",
        "expression",
    ] = "grpo"
    h: str = ""  # for expression: h(t), t the pass rate, e.g. "log(t / (1 - t))"
    smoothing: float = Field(default=0.0, ge=0)  # for expression: keeps h finite at 0 and 1, e.g. 1/(2 group_size)
    n: PositiveInt = 2  # for pass_at_n; the more, the less is learnt from prompts that are often answered
    std: Literal["population", "bessel", "none"] = "population"  # what grpo divides by; none: Dr. GRPO
    epsilon: float = Field(default=0.0, ge=0)  # for grpo: added to the standard deviation
    baseline: Literal["leave_one_out", "none"] = "leave_one_out"  # for pass_at_n, logit, expression: less variance
    num_correct: PositiveInt = 1  # for pure_rejection_sampling: B
    dynamic_sampling: bool = False  # leave out groups that are all correct or all incorrect
    # Each sequence's mean over its tokens (GRPO), the mean over all tokens (DAPO), or each sequence's sum divided by
    # constant_tokens (Dr. GRPO; with 1, exactly the gradient of h). All count the samples of weight 0 too.
    normalisation: Literal["sequence", "token", "constant"] = "token"
    constant_tokens: PositiveInt = 1  # for normalisation=constant, e.g. rollout.max_new_tokens
    ratio: Literal["token", "sequence"] = "token"  # to the policy at the step's start; sequence: its mean (GSPO)
    clip_low: float | None = Field(default=0.2, gt=0, le=1)  # the ratio counts from 1 - clip_low; null: no clipping
    clip_high: float | None = Field(default=0.2, gt=0)  # to 1 + clip_high; DAPO: 0.28; null: no clipping
    kl_kind: Literal["k3", "mse"] = "k3"
    kl_coef: float = Field(default=0.0, ge=0)  # of the KL to the initial policy, a mean over tokens

    @model_validator(mode="after")
    def check(self) -> Self:
        if self.objective == "expression" and not self.h.strip():
            raise ValueError("algorithm.h is required for algorithm.objective=expression: set h, e.g. log(t + 0.1)")
        for name in self.model_dump(include=set(OBJECTIVE_OPTIONS), exclude_defaults=True):
            if self.objective not in OBJECTIVE_OPTIONS[name]:
                raise ValueError(
                    f"algorithm.{name} has no meaning for algorithm.objective={self.objective}: drop it, or set "
                    f"algorithm.objective to {' or '.join(OBJECTIVE_OPTIONS[name])}"
                )
        if self.constant_tokens != 1 and self.normalisation != "constant":
            raise ValueError(
                f"algorithm.constant_tokens has no meaning for algorithm.normalisation={self.normalisation}: drop it"
            )
        return self


OBJECTIVE_OPTIONS: dict[str, tuple[str, ...]] = {  # which objectives an option belongs to
    "h": ("expression",),
    "smoothing": ("expression",),
    "n": ("pass_at_n",),
    "std": ("grpo",),
    "epsilon": ("grpo",),
    "baseline": ("pass_at_n", "logit", "expression"),
    "num_correct": ("pure_rejection_sampling",),
}
