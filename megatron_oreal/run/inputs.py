"""Reads and checks what every kind of run needs before it builds anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_oreal.config import (
    EvalRunConfig,
    RolloutConfig,
    SftConfig,
    TrainConfig,
    check_layout,
    check_lengths,
)
from megatron_oreal.data.prompts import EncodedPrompt, encode_prompts, read_prompts
from megatron_oreal.data.tokenizer import Tokenizer, load_tokenizer
from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.types import Int32Array
from megatron_oreal.weights.families import Architecture, read_architecture, trainable_families


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
