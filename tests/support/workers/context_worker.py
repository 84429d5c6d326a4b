"""Compares every algorithm's updates under context parallelism with those of replicas; torchrun runs this file.

Each layout builds an algorithm and its models as a run does, and makes two updates on the same groups. Metrics and the
gradients of the last optimizer step must agree.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.utils import logging as transformers_logging

from megatron_oreal.config import ParallelConfig, SftConfig, TrainConfig
from megatron_oreal.models import parallel
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.run.algorithms import build_algorithm, build_sft
from megatron_oreal.types import Group, Prompt, Sample, Verdict
from megatron_oreal.weights.stream import WeightStream
from tests.support.tiny_models import VOCAB_SIZE, random_sequences, write_tiny_model

# Each layout, and the settings of the model for it.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "DP4": ({}, {}, {}),
    "CP2 x DP2, recomputed attention": (
        {"context": 2},
        {"recompute": "selective", "recompute_modules": ["core_attn"]},
        {},
    ),
    "CP2 x TP2+SP": ({"context": 2, "tensor": 2, "sequence": True}, {}, {}),
    "CP2 x PP2, sharded optimizer": ({"context": 2, "pipeline": 2}, {}, {"distributed": True}),
    "CP4, recomputed": ({"context": 4}, {"recompute": "full"}, {"distributed": True}),
}
LEARNS = {"optimizer": {"lr": 1e-2, "weight_decay": 0.0}}
CASES: dict[str, dict[str, Any]] = {
    # The first update trains the reward model; in the second, its scores weight the policy's tokens.
    "oreal": {
        "algorithm": {"policy_freeze_steps": 1, "kl_coef": 0.1, "reward_model": LEARNS},
    },
    "oreal, top_k": {
        "algorithm": {
            "policy_freeze_steps": 1,
            "token_weights": "top_k",
            "score_position": "at",
            "denominators": "sequences",
            "selection": "all",
            "reward_model": LEARNS,
        },
        "rollout": {"corrects": "always"},
    },
    "grpo": {
        "algorithm": {
            "name": "outcome",
            "ratio": "sequence",
            "normalisation": "sequence",
            "whiten_advantages": True,
            "kl_coef": 0.1,
        },
        "policy": {"updates_per_step": 2},
    },
    "h(p), kept tokens": {
        "algorithm": {
            "name": "outcome",
            "objective": "expression",
            "h": "log(t + 0.1)",
            "covariance": "clip",
            "covariance_share": 0.1,
            "covariance_low": -1.0,
        },
        "rollout": {"top_k": 9, "loss_support": "sampled"},
    },
    "ppo": {
        "algorithm": {
            "name": "ppo",
            "gae_lambda": 0.9,
            "discount": 0.95,
            "kl_coef": 0.1,
            "kl_reward_coef": 0.05,
            "entropy_coef": 0.01,
            "policy_minibatches": 2,
            "critic_minibatches": 2,
            "critic": {"head_init": "normal"},
        }
    },
}
CHECKS = 0


def main(folder: Path) -> None:
    transformers_logging.disable_progress_bar()
    results: dict[str, dict[str, Any]] = {}
    for name, (sizes, model, optimizer) in LAYOUTS.items():
        config = ParallelConfig(**sizes, microbatch_tokens=64)
        layout = parallel.initialize(config, seed=0)
        if not results:
            if layout.is_main:
                write_tiny_model(folder / "model", tied=True, num_layers=2)
            dist.barrier()
        results[name] = updates_of(folder, config, model, optimizer, layout)
        parallel.destroy_groups()
        if dist.get_rank() == 0:
            print(name, flush=True)
    first, expected = next(iter(results.items()))
    for name, result in results.items():
        for case, found in result.items():
            compare(found, expected[case], f"{case}, {name} against {first}")
    print(f"rank {dist.get_rank()} passed {CHECKS} checks", flush=True)
    dist.destroy_process_group()


def updates_of(
    folder: Path, config: ParallelConfig, model: dict[str, Any], optimizer: dict[str, Any], layout: ParallelLayout
) -> dict[str, Any]:
    common = {
        "run_dir": folder / "run",
        "num_steps": 2,
        "model": {"path": folder / "model", "dtype": "float32", "head_precision": "fp32", **model},
        "parallel": config,
        "policy": {"optimizer": {"lr": 1e-6, "clip_grad": 0.5, **optimizer}},
    }
    sft = SftConfig.model_validate(common | {"data": {"examples": "examples.jsonl", "format": "plain"}})
    algorithm, models = build_sft(sft, layout)
    metrics = [algorithm.update(random_sequences(9), step) for step in range(2)]
    results: dict[str, Any] = {"sft": (metrics, gradients_of(models))}
    for name, case in CASES.items():
        settings = common | {"data": {"prompts": "prompts.jsonl", "format": "plain"}} | case
        settings["policy"] = common["policy"] | case.get("policy", {})
        settings["rollout"] = {"group_size": 4, "max_new_tokens": 20} | case.get("rollout", {})
        run = TrainConfig.model_validate(settings)
        learner, models = build_algorithm(run, layout)
        metrics = [dict(learner.update(groups(step), step)) for step in range(2)]
        results[name] = (metrics, gradients_of(models))
    return results


def groups(step: int) -> list[Group]:
    rng = random.Random(step)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(low, high))]

    def sample(prompt_ids: list[int], name: str, is_correct: bool) -> Sample:
        response = tokens(1, 20)
        logprobs = [-3.0 - rng.random() for _ in response]
        verdict = Verdict(float(is_correct), "correct" if is_correct else "incorrect", None)
        return Sample(name, prompt_ids, response, "", logprobs, logprobs, "stop", step, verdict)  # type: ignore[arg-type]

    made = []
    for number in range(3):
        prompt_ids = tokens(2, 8)
        samples = [sample(prompt_ids, str(number), index % (2 + number) == 0) for index in range(4)]
        made.append(Group(Prompt(str(number), (), ""), samples))
    return made


def gradients_of(models: dict[str, TrainableModel]) -> dict[str, dict[str, Tensor]]:
    """Returns the gradients of each trained model's last optimizer step, by Hugging Face names."""
    gradients = {}
    for name, model in models.items():
        if model.training is None:
            continue
        if model.optimizer_is_sharded:  # a rank only has the sums of its share
            gradients[name] = {}
            continue
        shards = [(key, parameter.main_grad) for key, parameter in model.parameters()]  # type: ignore[attr-defined]
        stream = WeightStream(shards, model.architecture, model.head.kind, model.layout)
        gradients[name] = {key: gradient.clone() for key, gradient in stream}
    return gradients


def compare(found: Any, wanted: Any, what: str) -> None:
    global CHECKS
    for step, (metrics, wanted_metrics) in enumerate(zip(found[0], wanted[0], strict=True)):
        assert metrics.keys() == wanted_metrics.keys(), f"{what}: {metrics.keys() ^ wanted_metrics.keys()}"
        for name, value in metrics.items():
            CHECKS += 1
            scale = max(1e-2, abs(wanted_metrics[name]))
            error = abs(value - wanted_metrics[name]) / scale
            assert error <= 1e-5, f"{what}, update {step}: {name} is {value}, not {wanted_metrics[name]}"
    for model, gradients in found[1].items():
        if not gradients:
            continue
        CHECKS += 1
        expected = wanted[1][model]
        norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
        assert norm > 0, f"{what}: {model} has no gradient"
        difference = torch.cat([(gradients[name] - gradient).flatten() for name, gradient in expected.items()]).norm()
        assert difference / norm <= 1e-6, f"{what}: {model}'s gradient is off by {difference / norm:.1e} of its norm"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
