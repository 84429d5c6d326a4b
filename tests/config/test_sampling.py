"""Which distribution the rollout settings make the trainer train, and what a run says about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_oreal.config import TrainConfig
from megatron_oreal.run.inputs import note_sampling
from megatron_oreal.train import measured

MASK = (
    "losses, KL and policy/mismatch are of the distribution before that (rollout.loss_support=sampled applies the mask)"
)

FOUND = "which the trainer finds with its own logits; those of the reference are of all tokens"


def config(**rollout: Any) -> TrainConfig:
    sections = {"model": {"path": "m"}, "data": {"prompts": "p"}, "rollout": rollout}
    return TrainConfig.model_validate({"run_dir": Path("r"), "num_steps": 3} | sections)


@pytest.mark.parametrize(
    ("rollout", "known", "note"),
    [
        ({}, "model", None),
        ({"temperature": 0.6}, "rollout", None),
        ({"top_p": 0.9}, "model", f"rollout: samples are truncated by top_p=0.9, top_k=0, but {MASK}"),
        (
            {"top_k": 5, "engine": "sglang"},
            "model",
            f"rollout: samples are truncated by top_p=1, top_k=5, but {MASK}",
        ),
        (
            {"temperature": 0.6, "top_p": 0.9},
            "unknown",
            f"rollout: samples are truncated by top_p=0.9, top_k=0, but {MASK}; the engine's log-probs at temperature "
            "0.6 before truncation are not known: policy/mismatch is not measured",
        ),
        (
            {"temperature": 0.6, "top_p": 0.9, "loss_support": "sampled"},
            "rollout",
            f"rollout: losses are within the tokens that top_p=0.9, top_k=0 keep, {FOUND}",
        ),
        (
            {"top_k": 5, "loss_support": "sampled", "engine": "sglang"},
            "unknown",
            f"rollout: losses are within the tokens that top_p=1, top_k=5 keep, {FOUND}; the engine's log-probs at "
            "temperature 1 after truncation are not known: policy/mismatch is not measured",
        ),
        (
            {"temperature": 0.6, "engine": "sglang", "staleness": 1},
            "unknown",
            "rollout: the engine's log-probs at temperature 0.6 before truncation are not known: policy/mismatch is "
            "not measured, and off-policy tokens have the weight 1",
        ),
    ],
)
def test_what_is_trained_and_what_is_said(rollout: dict[str, Any], known: str, note: str | None) -> None:
    run, notes = config(**rollout), list[str]()
    note_sampling(notes, run)
    assert run.rollout.engine_logprobs == known
    assert notes == ([] if note is None else [note])
    metrics = {"policy/loss": 1.0, "policy/mismatch": 0.0, "policy/mismatch_max": 0.0, "policy/importance_mean": 1.0}
    assert measured(run, metrics) == ({"policy/loss": 1.0} if known == "unknown" else metrics)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"engine": "sglang", "staleness": 1, "top_p": 0.9}, "finds the kept tokens with the policy that sampled"),
        ({"engine": "sglang", "unfinished": "resume", "top_p": 0.9}, "finds the kept tokens with the policy"),
        ({"corrects": "always", "old_logprobs": "engine", "top_p": 0.9}, "drop rollout.old_logprobs=engine"),
        ({"engine": "sglang", "top_p": 0.9, "top_k": 5}, "give only one of rollout.top_p and rollout.top_k"),
    ],
)
def test_what_the_kept_tokens_cannot_be_found_for(rollout: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(loss_support="sampled", **rollout)


def test_kept_tokens_have_no_fp8_products() -> None:
    sections = {"model": {"path": "m", "head_precision": "fp8_grad"}, "data": {"prompts": "p"}}
    rollout = {"loss_support": "sampled", "top_p": 0.9}
    with pytest.raises(ValidationError, match=r"rollout\.loss_support=sampled has no FP8 products"):
        TrainConfig.model_validate({"run_dir": Path("r"), "num_steps": 3, "rollout": rollout} | sections)
