"""An OREAL run of a random model, opened as `megatron-oreal train` opens one, for measuring its phases."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_oreal.algorithms.model import GroupAlgorithm
from megatron_oreal.config import TrainConfig
from megatron_oreal.data.prompts import EncodedPrompt
from megatron_oreal.observability.metrics import Metrics
from megatron_oreal.run.open import open_train
from megatron_oreal.run.run import Run
from megatron_oreal.types import Group
from tools.gpu.findings import prepare_quickstart
from tools.gpu.random_model import SHAPES, Lengths, ModelShape, draw_lengths, make_groups, write_model

GROUP_SIZE = 16
TrainRun = Run[TrainConfig, EncodedPrompt, GroupAlgorithm]


@dataclass(slots=True)
class ModelRun:
    run: TrainRun
    shape: ModelShape
    groups: list[Group]
    lengths: list[Lengths]

    def update(self, step: int) -> tuple[Metrics, float]:
        """All optimizer steps on the groups: (metrics, seconds)."""
        synchronize()
        start = time.perf_counter()
        metrics = self.run.algorithm.update(self.groups, step)
        synchronize()
        return metrics, time.perf_counter() - start

    @property
    def sequence_lengths(self) -> list[int]:
        """Of one correct and one incorrect sample a group, which is what the algorithm trains on."""
        return [each.prompt + each.response for each in self.lengths for _ in range(2)]

    def update_flops(self) -> float:
        """Forward and backward of policy and reward model (3 x forward each), and the reference's forward pass.

        Only the policy and the reference meet the vocabulary, at response tokens. Recomputation counts nothing.
        """
        trained = 2 * sum(each.response for each in self.lengths)
        logprobs = self.shape.forward_flops(self.sequence_lengths, trained)
        return 3 * logprobs + 3 * self.shape.forward_flops(self.sequence_lengths, 0) + logprobs


@contextlib.contextmanager
def opened(size: str, work: Path, num_prompts: int, settings: Sequence[str], rows: int = 512) -> Iterator[ModelRun]:
    """A run of the shape `size` in the folder `work`; `settings` are SECTION.KEY=VALUE, as on the command line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    prepare_quickstart(work / "tokenizer", num_examples=100)
    write_model(SHAPES[size], work / f"model-{size}", device, dtype)
    config = TrainConfig.model_validate(
        with_settings(
            {
                "run_dir": str(work / f"run-{size}-{time.time_ns()}"),
                "num_steps": 1000,
                "model": {
                    "path": str(work / f"model-{size}"),
                    "tokenizer": str(work / "tokenizer" / "model"),
                    "dtype": str(dtype).removeprefix("torch."),
                },
                "parallel": {"microbatch_tokens": 16384},
                "data": {
                    "prompts": str(work / "tokenizer" / "train.jsonl"),
                    "format": "plain",
                    "prompts_per_step": num_prompts,
                    "max_prompt_tokens": 16,
                },
                "rollout": {"group_size": GROUP_SIZE, "max_new_tokens": 1024, "batch_size": rows},
                "algorithm": {"policy_freeze_steps": 0, "reward_model": {"optimizer": {"lr": 1e-7}}},
                "policy": {"optimizer": {"lr": 1e-7}},
                "checkpoint": {"export_hf": False},
            },
            settings,
        )
    )
    rng, shape = random.Random(0), SHAPES[size]
    lengths = draw_lengths(num_prompts, rng, scale=0.05 if size == "tiny" else 1.0)
    with open_train(config) as run:
        prompts = [item.prompt for item in run.cursor.next_batch(num_prompts)]
        groups = make_groups(prompts, lengths, GROUP_SIZE, shape.vocabulary, rng)
        yield ModelRun(run, shape, groups, lengths)


def with_settings(config: dict[str, object], settings: Sequence[str]) -> dict[str, object]:
    for setting in settings:
        path, _, value = setting.partition("=")
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section.setdefault(name, {})  # type: ignore[assignment]
        section[key] = value
    return config


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
