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
from megatron_oreal.config.model_files import read_end_tokens
from megatron_oreal.data.prompts import EncodedPrompt, encode_prompts, read_prompts
from megatron_oreal.data.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from megatron_oreal.engines.engine import SamplingParams
from megatron_oreal.types import Int32Array
from megatron_oreal.weights.families import Architecture, read_architecture, trainable_families


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of a run, which are the same for every kind of run."""

    architecture: Architecture
    tokenizer: Tokenizer
    sampling: SamplingParams
    eval_prompts: Mapping[str, list[EncodedPrompt]]
    notes: list[str]  # lines for the log about data that was left out


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
    sampling = sampling_params(config.rollout, tokenizer, architecture, read_end_tokens(config.model.path))
    return Inputs(architecture, tokenizer, sampling, datasets, notes)


def check_vocabulary(sequences: Iterable[Int32Array], architecture: Architecture) -> None:
    """Raises ValueError for a tokenizer with tokens that the model does not have."""
    largest = max(int(token_ids.max()) for token_ids in sequences)
    if largest >= architecture.vocab_size:
        raise ValueError(
            f"model.tokenizer: its token {largest} is beyond the model's vocab_size={architecture.vocab_size}; "
            "give the tokenizer that belongs to model.path"
        )


def check_initial_weights(config: TrainConfig, architecture: Architecture) -> None:
    """Raises ValueError if a reward model's or a critic's initial weights have another architecture than the policy."""
    for name, model in config.algorithm.scalar_models.items():
        path = model.path
        if path is not None and (not (path / "config.json").is_file() or read_architecture(path) != architecture):
            raise ValueError(
                f"algorithm.{name}.path: {path} is not a Hugging Face directory of the policy's architecture; give one "
                "or drop it"
            )


# The check treats two tokenizers as the same if they encode this text alike.
PROBE = "Solve 12x + 3.5 = -7/2 for x.\n\nStep 1: \\frac{a}{b}, so \\boxed{-0.58}. Wait, α ≤ 2!"


def check_teacher(config: TrainConfig, architecture: Architecture, tokenizer: Tokenizer) -> None:
    """Raises ValueError for a teacher that this layout cannot hold, or whose tokens are not the policy's."""
    path = config.algorithm.reference_path
    if path is None:
        return
    try:
        theirs = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
        check_lengths(config, check_layout(theirs, trainable_families()))
        teacher = read_architecture(path)
    except ValueError as error:
        raise ValueError(f"algorithm.teacher: {str(error).removeprefix('model.path: ')}") from None
    if teacher.vocab_size < architecture.vocab_size:
        raise ValueError(
            f"algorithm.teacher: its vocab_size={teacher.vocab_size} is below the policy's {architecture.vocab_size}: "
            "give a model that has all of the policy's tokens"
        )
    if has_tokenizer(path) and load_tokenizer(path).encode(PROBE) != tokenizer.encode(PROBE):
        raise ValueError(
            f"algorithm.teacher: the tokenizer in {path} is not that of {config.model.tokenizer_path}: give a model "
            "that has the policy's tokens"
        )


def sampling_params(
    config: RolloutConfig, tokenizer: Tokenizer, architecture: Architecture, end_tokens: Mapping[int, str]
) -> SamplingParams:
    """Returns the sampling parameters of responses, with the end tokens of tokenizer, model and configuration.

    end_tokens: those that the model's files name, with the file. Raises ValueError for an end token that the model does
    not have, and for a stop string that no tokens can encode.
    """
    stop_ids = tokenizer.stop_token_ids(config.stop_tokens)
    for number in [*stop_ids, *end_tokens]:
        if number >= architecture.vocab_size:
            owner = "model.tokenizer: its" if number in stop_ids else f"model.path: the {end_tokens[number]}'s"
            raise ValueError(
                f"{owner} end token {number} is beyond the model's vocab_size={architecture.vocab_size}, so no "
                "response could end with it; correct the file, or give the tokenizer that belongs to model.path"
            )
    tokenizer.check_stop_strings(config.stop_strings)
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=config.max_new_tokens,
        max_total_tokens=config.max_total_tokens,
        stop_token_ids=tuple(dict.fromkeys([*stop_ids, *end_tokens])),
        stop_strings=tuple(config.stop_strings),
    )


def note_sampling(notes: list[str], config: TrainConfig) -> None:
    """Describes in one line which parts of the sampled distribution the losses approximate or do not know."""
    rollout, parts = config.rollout, []
    if rollout.trains_truncated:
        parts.append(
            f"losses are within the tokens that top_p={rollout.top_p:g}, top_k={rollout.top_k} keep, which the trainer "
            "finds with its own logits; those of the reference are of all tokens"
        )
    elif rollout.is_truncated:
        parts.append(
            f"samples are truncated by top_p={rollout.top_p:g}, top_k={rollout.top_k}, but losses, KL and "
            "policy/mismatch are of the distribution before that (rollout.loss_support=sampled applies the mask)"
        )
    if rollout.engine_logprobs == "unknown":
        unweighted = "" if config.correction is None else ", and off-policy tokens have the weight 1"
        place = "after" if rollout.trains_truncated else "before"
        parts.append(
            f"the engine's log-probs at temperature {rollout.temperature:g} {place} truncation are not known: "
            f"policy/mismatch is not measured{unweighted}"
        )
    if parts:
        notes.append("rollout: " + "; ".join(parts))


def note_skipped(notes: list[str], count: int, what: str) -> None:
    if count:
        notes.append(f"skipped {count} {what}")
