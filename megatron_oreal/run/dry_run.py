"""Checks for `--dry-run` the model's layout, the data and the objective besides the settings. Trains nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_oreal.config import (
    EvalRunConfig,
    SftConfig,
    TrainConfig,
    check_layout,
    check_lengths,
    describe_layout,
    to_yaml,
)
from megatron_oreal.weights.families import trainable_families

if TYPE_CHECKING:
    from megatron_oreal.types import Message

Config = TrainConfig | SftConfig | EvalRunConfig
MAX_SHOWN = 2000  # characters of a prompt


def describe_run(config: Config) -> Iterator[str]:
    """Yields the resolved settings and the parallel layout, then what was checked, part by part.

    The model may be missing, because it may not be downloaded yet; the layout is then shown without it. Raises
    ValueError for whatever would stop the run at its start.
    """
    yield to_yaml(config)
    yield describe_layout(config)
    yield describe_model(config)
    if importlib.util.find_spec("torch") is None:
        yield "data: not checked, because torch is not installed here"
        return
    check_algorithm(config)
    yield from describe_data(config)


def describe_model(config: Config) -> str:
    path = config.model.path
    if not path.exists():
        return f"model.path: {path} does not exist yet, so the layout was not compared with the model"
    shape = check_layout(config, trainable_families())
    check_lengths(config, shape)
    return (
        f"model.path: {shape.model_type}, {shape.num_hidden_layers} layers, vocabulary of {shape.vocab_size:,} tokens"
    )


def describe_data(config: Config) -> Iterator[str]:
    """Reads every file of prompts and examples; yields a line for each. Raises ValueError for the first mistake."""
    from megatron_oreal.data.examples import read_examples
    from megatron_oreal.data.prompts import read_prompts

    if isinstance(config, TrainConfig):
        prompts = read_prompts(config.data.prompts, "data.prompts")
        steps = len(prompts) / config.data.prompts_per_step
        yield f"data.prompts: {len(prompts):,} prompts, enough for {steps:.3g} steps without repetition"
        yield from describe_prompt(config, prompts[0].messages)
    if isinstance(config, SftConfig):
        examples = read_examples(config.data.examples)
        steps = len(examples) / config.data.sequences_per_step
        yield f"data.examples: {len(examples):,} examples, enough for {steps:.3g} steps without repetition"
        yield from describe_prompt(config, examples[0].messages)
    for number, (name, path) in enumerate(config.eval.prompts.items()):
        setting = f"eval.prompts.{name}"
        prompts = read_prompts(path, setting)
        yield f"{setting}: {len(prompts):,} prompts"
        if number == 0 and isinstance(config, EvalRunConfig):
            yield from describe_prompt(config, prompts[0].messages)


def describe_prompt(config: Config, messages: Sequence[Message]) -> Iterator[str]:
    """Yields the first prompt as the model reads it: after data.format, data.system_prompt and data.suffix."""
    from megatron_oreal.data.tokenizer import has_tokenizer, load_tokenizer

    path = config.model.tokenizer_path
    if not has_tokenizer(path):
        yield f"model.tokenizer: {path} holds no tokenizer yet, so no prompt was encoded"
        return
    tokenizer = load_tokenizer(path)
    text = tokenizer.render_prompt(messages, config.data)
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} [...] {text[-MAX_SHOWN // 2 :]}"
    yield f"the first prompt, {len(tokenizer.encode_prompt(messages, config.data))} tokens: {shown!r}"


def check_algorithm(config: Config) -> None:
    if isinstance(config, TrainConfig):
        from megatron_oreal.algorithms.registry import ALGORITHMS

        check = ALGORITHMS[config.algorithm.name].check
        if check is not None:
            check(config.algorithm, config.rollout.group_size)
