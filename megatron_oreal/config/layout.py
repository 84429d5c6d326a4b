"""Checks a configuration against the model's shape and the number of processes, without loading the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from megatron_oreal.config.loading import describe
from megatron_oreal.config.model_files import read_model_settings
from megatron_oreal.config.models import ModelConfig, ParallelConfig
from megatron_oreal.config.runs import EvalRunConfig, ModelRunConfig, SftConfig, TrainConfig


class ModelShape(BaseModel):
    """The part of a Hugging Face config.json that the layout checks need."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())
    model_type: str
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt  # if config.json has none, as for some Llamas: the number of attention heads
    vocab_size: PositiveInt
    max_position_embeddings: PositiveInt = 1 << 30

    @model_validator(mode="before")
    @classmethod
    def fill_in_key_value_heads(cls, settings: dict[str, Any]) -> dict[str, Any]:
        if settings.get("num_key_value_heads") is None and "num_attention_heads" in settings:
            return settings | {"num_key_value_heads": settings["num_attention_heads"]}
        return settings


def read_model_shape(path: Path) -> ModelShape:
    """Reads the shape from `path`/config.json. Raises ValueError if the file is missing or lacks a setting."""
    try:
        return ModelShape.model_validate(read_model_settings(path))
    except ValidationError as error:
        raise ValueError(f"model.path: {path / 'config.json'}: {describe(error)}") from None


def data_parallel_size(parallel: ParallelConfig) -> int:
    """Returns the number of replicas. Raises ValueError if a launcher's world size does not fit the layout."""
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    world_size = os.environ.get("WORLD_SIZE")  # torchrun and the Slurm scripts set this variable.
    if world_size is None:
        return parallel.data or 1
    if not world_size.isdecimal() or int(world_size) == 0:
        raise ValueError(f"WORLD_SIZE must be the launcher's number of processes, got {world_size!r}: unset it")
    if int(world_size) % model_size:
        factors = [f"parallel.tensor={parallel.tensor}", f"parallel.pipeline={parallel.pipeline}"]
        if parallel.context > 1:
            factors.insert(1, f"parallel.context={parallel.context}")
        raise ValueError(
            f"{' x '.join(factors)} must divide the {world_size} processes started: change the layout or the number "
            "of processes"
        )
    data = int(world_size) // model_size
    if parallel.data not in (None, data):
        raise ValueError(
            f"parallel.data={parallel.data} but the {world_size} processes started make it {data}: drop it"
        )
    return data


def num_processes(parallel: ParallelConfig) -> int:
    """Returns the number of processes of the whole run."""
    return parallel.tensor * parallel.pipeline * parallel.context * data_parallel_size(parallel)


def check_layout(config: ModelRunConfig, known_model_types: Sequence[str]) -> ModelShape:
    """Raises ValueError for a layout that the model does not support. Reads config.json only, no weights."""
    shape, parallel = read_model_shape(config.model.path), config.parallel
    if shape.model_type not in known_model_types:
        raise ValueError(
            f"model.path: model_type {shape.model_type!r} is not supported; known: {', '.join(known_model_types)}"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        if getattr(shape, name) % parallel.tensor:
            raise ValueError(f"parallel.tensor={parallel.tensor} must divide the model's {name}={getattr(shape, name)}")
    stages = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if shape.num_hidden_layers % stages:
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_pipeline={parallel.virtual_pipeline or 1} must "
            f"divide the model's num_hidden_layers={shape.num_hidden_layers}"
        )
    data_parallel_size(parallel)
    if parallel.context > 1:
        check_context(config.model, shape)
    return shape


def check_context(model: ModelConfig, shape: ModelShape) -> None:
    """Refuses settings that context parallelism does not support. Raises ValueError."""
    refused = {
        "model.implementation=transformer_engine": model.implementation == "transformer_engine",
        # FP8 needs Transformer Engine, which context parallelism does not support
        f"model.fp8={model.fp8}": model.fp8 is not None,
        f"a mixture of experts ({shape.model_type})": "moe" in shape.model_type or shape.model_type == "mixtral",
    }
    for what, is_asked_for in refused.items():
        if is_asked_for:
            raise ValueError(f"parallel.context > 1 does not run with {what} yet: set parallel.context=1")


def check_lengths(config: TrainConfig | SftConfig | EvalRunConfig, shape: ModelShape) -> None:
    """Refuses sequences that are longer than the model's positions. Raises ValueError with the setting to lower."""
    limit = f"exceeds the model's max_position_embeddings={shape.max_position_embeddings}: lower"
    rollout, longest_prompt = config.rollout, config.data.max_prompt_tokens
    generates = isinstance(config, TrainConfig) or config.eval.prompts
    if generates and rollout.max_total_tokens is not None and rollout.max_total_tokens <= longest_prompt:
        raise ValueError(
            f"rollout.max_total_tokens={rollout.max_total_tokens} must exceed data.max_prompt_tokens={longest_prompt}, "
            "or the longest prompts leave no room for a response: raise it, or lower data.max_prompt_tokens"
        )
    longest = rollout.longest_sequence(longest_prompt)
    if longest > shape.max_position_embeddings and generates:
        if rollout.max_total_tokens == longest:
            raise ValueError(f"rollout.max_total_tokens={longest} {limit} it")
        raise ValueError(f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} {limit} one of the two")
    if isinstance(config, SftConfig) and config.data.max_tokens > shape.max_position_embeddings:
        raise ValueError(f"data.max_tokens={config.data.max_tokens} {limit} it")


def describe_layout(config: ModelRunConfig) -> str:
    """Returns the parallel layout as a table in Megatron's order of ranks: tensor, context, data, pipeline."""
    parallel, data = config.parallel, data_parallel_size(config.parallel)
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "data": data, "pipeline": parallel.pipeline}
    if parallel.context == 1:
        del sizes["context"]
    product = " x ".join(f"{name} {sizes[name]}" for name in ("tensor", "context", "pipeline", "data") if name in sizes)
    lines = [
        f"parallel layout: {num_processes(parallel)} processes = {product}, "
        f"sequence parallel {'on' if parallel.sequence else 'off'}",
        "  rank" + "".join(f"  {name}" for name in sizes),
    ]
    for rank in range(min(num_processes(parallel), 64)):
        row, rest = f"  {rank:4d}", rank
        for name, size in sizes.items():
            row += f"  {rest % size:{len(name)}d}"
            rest //= size
        lines.append(row)
    return "\n".join(lines)
