"""Reads and checks what every kind of run needs before it builds anything."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from megatron_oreal.config import (
    EvalRunConfig,
    ModelRunConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
    check_layout,
    check_lengths,
    flatten,
    read_resolved,
    to_yaml,
)
from megatron_oreal.data.prompts import EncodedPrompt, encode_prompts, read_prompts
from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer
from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.types import Int32Array
from megatron_oreal.weights.families import Architecture, read_architecture, trainable_families

# Settings that may change between a run and its continuation.
CHANGEABLE = (
    "num_steps", "run_dir", "checkpoint.", "verifier.num_workers", "parallel.timeout_seconds", "rollout.sglang.",
)  # fmt: skip
# An evaluation may be given more datasets, and be summed up in another way.
CHANGEABLE_IN_EVAL = (
    *CHANGEABLE,
    *(f"eval.{name}" for name in ("prompts.", "pass_at", "majority_at", "confidence", "num_resamples")),
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What was read: the same for every kind of run."""

    architecture: Architecture
    tokenizer: Tokenizer
    sampling: SamplingParams
    eval_prompts: Mapping[str, list[EncodedPrompt]]
    notes: list[str]  # What was left out, for the log.


def read_inputs(config: TrainConfig | SftConfig | EvalRunConfig) -> Inputs:
    """Reads architecture, tokenizer and held-out prompts, and checks them against each other. Raises ValueError."""
    check_lengths(config, check_layout(config, trainable_families()))
    architecture, tokenizer = read_architecture(config.model.path), load_tokenizer(config.model.tokenizer_path)
    datasets: dict[str, list[EncodedPrompt]] = {}
    notes: list[str] = []
    for name, path in config.eval.prompts.items():
        setting = f"eval.prompts.{name}"
        prompts = read_prompts(path, setting)[: config.eval.max_prompts]
        datasets[name], num_skipped = encode_prompts(prompts, tokenizer, config.data, setting)
        check_vocabulary((prompt.token_ids for prompt in datasets[name]), architecture)
        note_skipped(notes, num_skipped, f"prompts of {setting} longer than data.max_prompt_tokens")
    return Inputs(architecture, tokenizer, sampling_params(config.rollout, tokenizer), datasets, notes)


def check_vocabulary(sequences: Iterable[Int32Array], architecture: Architecture) -> None:
    """Refuses a tokenizer whose tokens the model does not have."""
    largest = max(int(token_ids.max()) for token_ids in sequences)
    if largest >= architecture.vocab_size:
        raise ValueError(
            f"model.tokenizer: its token {largest} is beyond the model's vocab_size={architecture.vocab_size}; "
            "give the tokenizer that belongs to model.path"
        )


def check_initial_weights(config: TrainConfig, architecture: Architecture) -> None:
    """Refuses initial weights of a reward model or a critic that are not of the policy's architecture."""
    for name, model in config.algorithm.scalar_models.items():
        path = model.path
        if path is not None and (not (path / "config.json").is_file() or read_architecture(path) != architecture):
            raise ValueError(
                f"algorithm.{name}.path: {path} is not a Hugging Face directory of the policy's architecture; give one "
                "or drop it"
            )


def sampling_params(config: RolloutConfig, tokenizer: Tokenizer) -> SamplingParams:
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        stop_token_ids=tuple(tokenizer.stop_token_ids(config.stop_tokens)),
    )


def note_skipped(notes: list[str], count: int, what: str) -> None:
    if count:
        notes.append(f"skipped {count} {what}")


def check_run_dir(config: ModelRunConfig, changeable: tuple[str, ...] = CHANGEABLE) -> None:
    """Refuses a folder that another configuration has begun to fill. Raises ValueError with the differences.

    A run that an older version began resumes: a setting that did not exist then has its default, sections are read
    where they stood, and settings without effect are not compared.
    """
    file = config.run_dir / "config.yaml"
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ValueError(f"run_dir: {config.run_dir} is a file; give a folder")
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: {config.run_dir} cannot be made ({error.strerror}); give another folder") from None
    if not os.access(config.run_dir, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"run_dir: {config.run_dir} is not yours to write; change its permissions or give another")
    if not file.is_file():
        return
    before, now = read_resolved(file.read_text(), config), flatten(yaml.safe_load(to_yaml(config)))
    idle = {setting.name for setting in config.idle_settings()}
    if "num_steps" in changeable and moves_with_num_steps(now):
        changeable = tuple(name for name in changeable if name != "num_steps")
    differences = [
        f"{name}: {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name) and name not in idle and not name.startswith(changeable)
    ]
    if differences:
        raise ValueError(
            f"run_dir: {config.run_dir} belongs to another configuration ({'; '.join(differences)}); "
            "choose another run_dir, or restore these settings to resume"
        )


def moves_with_num_steps(settings: Mapping[str, object]) -> bool:
    """Says whether the decay of a learning rate ends with the run: then more steps are another schedule."""
    decays = [name for name, value in settings.items() if name.endswith(".optimizer.decay") and value != "constant"]
    return any(settings[f"{name}_steps"] is None for name in decays)
