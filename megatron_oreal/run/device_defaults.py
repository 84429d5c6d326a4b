"""Chooses the values of `auto` settings on this device, and describes the choices in one line.

The choice of recompute uses an estimate of the memory: weights, gradients and optimizer states of all models of the
run, the local engine's copy, and the activations of one micro-batch. The estimate of activations counts the tensors
that a layer keeps for its backward pass in bfloat16, with fused attention and SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from megatron_oreal.config import EvalRunConfig, SftConfig, TrainConfig, data_parallel_size
from megatron_oreal.models.build import resolved_for
from megatron_oreal.models.trainable import TrainableModel
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import Architecture, read_architecture

AnyConfig = TypeVar("AnyConfig", TrainConfig, SftConfig, EvalRunConfig)
# The planned share of a GPU's memory. The CUDA context, NCCL, the generation cache and fragmentation need the rest.
USABLE_SHARE = 0.85
HEAD_BYTES = 3 * 2**30  # for the tiles of linear_logprob and the largest temporaries of an update


def with_device_defaults(config: AnyConfig, architecture: Architecture) -> AnyConfig:
    """Returns the configuration with values for `auto` in model.dtype, model.recompute and deterministic."""
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if on_cuda else "cpu")
    model = config.model
    if on_cuda and model.recompute == "auto" and not isinstance(config, EvalRunConfig):
        total = torch.cuda.get_device_properties(device).total_memory
        recompute = fitting_recompute(estimate(config, architecture), int(USABLE_SHARE * total))
        model = model.model_copy(update={"recompute": recompute})
    deterministic = not on_cuda if config.deterministic == "auto" else config.deterministic
    return config.model_copy(update={"model": resolved_for(model, device), "deterministic": deterministic})


@dataclass(frozen=True, slots=True)
class Memory:
    """The number of bytes that a training run needs on one GPU."""

    states: int  # permanent: weights, gradients, optimizer states, the local engine
    activations: int  # of one micro-batch, without recompute
    mlp_activations: int  # the part of them in the MLPs
    one_layer: int  # of one layer during its recomputation


def fitting_recompute(memory: Memory, usable_bytes: int) -> str:
    """Returns the first of none, selective (the MLPs) and full that fits into the memory."""
    free = usable_bytes - memory.states - HEAD_BYTES
    if memory.activations <= free:
        return "none"
    return "selective" if memory.activations - memory.mlp_activations + memory.one_layer <= free else "full"


def estimate(config: TrainConfig | SftConfig, architecture: Architecture) -> Memory:
    parallel = config.parallel
    model_size = parallel.tensor * parallel.pipeline
    num_parameters = parameter_count(architecture)
    item = 4 if config.model.dtype == "float32" else 2
    num_trained, num_frozen = model_counts(config, num_parameters)
    shard = data_parallel_size(parallel) * parallel.context  # the number of ranks that share the optimizer states
    trained_bytes = (item + 4) + (12 if item == 2 else 8) / shard
    states = num_parameters / model_size * (num_trained * trained_bytes + num_frozen * item)
    if config.rollout.engine == "local":
        states += item * num_parameters
    shape = architecture
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    experts = shape.experts
    width = experts.intermediate_size * experts.num_per_token if experts else shape.intermediate_size
    norm = 2 * 4 * shape.hidden_size  # some releases of torch keep the norm's input and result in float32
    # These are the input, its norm, attention's input and output, and queries, keys and values before and after
    # rotation.
    attention = item * (4 * shape.hidden_size + 2 * heads) + norm
    # These are the input, its norm, gate, up and their product.
    mlp = item * (2 * shape.hidden_size + 3 * width) + norm
    # Without sequence parallelism each tensor-parallel rank keeps some tensors whole. The estimate treats all tensors
    # so.
    share = parallel.context * (parallel.tensor if parallel.sequence else 1)
    a_layer = parallel.microbatch_tokens * (attention + mlp) / share
    # A pipeline's first stage keeps one micro-batch for each stage, which is together as much as all layers of one.
    return Memory(
        states=int(states),
        activations=int(shape.num_layers * a_layer),
        mlp_activations=int(shape.num_layers * parallel.microbatch_tokens * mlp / share),
        one_layer=int(a_layer),
    )


def parameter_count(architecture: Architecture, only_active: bool = False) -> int:
    """Returns the number of a model's parameters, or of the parameters that multiply one token.

    The latter leaves out the experts that were not chosen, and the input embedding, which is only looked up.
    """
    shape, experts = architecture, architecture.experts
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    mlp = 3 * shape.hidden_size * shape.intermediate_size
    if experts:
        num_experts = experts.num_per_token if only_active else experts.count
        mlp = 3 * shape.hidden_size * experts.intermediate_size * num_experts
    vocabulary = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings or only_active else 2)
    return shape.num_layers * (attention + mlp) + vocabulary


def attention_pair_cost(architecture: Architecture) -> float:
    """Returns the factor of n^2 in the cost of a sequence of n tokens, where a token's own products cost 1.

    A token is multiplied with each of the parameters (2 FLOPs). Causal attention takes 4 FLOPs for each pair of tokens,
    each layer and each number of the heads, and there are n^2 / 2 pairs; the backward pass takes twice both.
    """
    attention = 2 * architecture.num_layers * architecture.num_heads * architecture.head_dim
    return attention / (2 * parameter_count(architecture, only_active=True))


def facts_of_start(architecture: Architecture, layout: ParallelLayout) -> dict[str, object]:
    """Returns what environment.jsonl records about the model and the devices; the report computes the MFU from it."""
    facts: dict[str, object] = {
        "num_processes": layout.world_size,
        "parameters": parameter_count(architecture),
        "active_parameters": parameter_count(architecture, only_active=True),
    }
    if layout.device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(layout.device), "cuda": str(torch.version.cuda)}
    return facts


def model_counts(config: TrainConfig | SftConfig, num_parameters: int) -> tuple[int, float]:
    """Returns upper bounds for the numbers of trained and of frozen models, in models of the policy's size."""
    if isinstance(config, SftConfig):
        return 1, 0
    num_frozen: float = int(config.algorithm.uses_reference)
    if (path := config.algorithm.reference_path) is not None:
        num_frozen = parameter_count(read_architecture(path)) / num_parameters
    return 1 + len(config.algorithm.scalar_models), num_frozen


def describe(config: TrainConfig | SftConfig, model: TrainableModel) -> str:
    """Returns one line that names what runs on this device, whether a setting or `auto` chose it."""
    layout, megatron, training = model.layout, model.megatron_config, model.training
    parts = [
        str(config.model.dtype),
        f"recompute {config.model.recompute}",
        f"{'Transformer Engine' if model.transformer_engine else 'local'} layers",
        f"deterministic {'updates' if config.deterministic else 'off'}",
    ]
    switches = {
        "fused SwiGLU": megatron.bias_activation_fusion,
        "fused rotary embedding": megatron.apply_rope_fusion,
        "fused weight gradients": megatron.gradient_accumulation_fusion,
        "sharded optimizer": training is not None and training.is_sharded,
        "overlapped gradient reduction": training is not None and training.overlaps_reduction,
        "log-probs by Liger's operator": config.model.head_backend == "liger",
    }
    parts += [name for name, is_on in switches.items() if is_on]
    return f"{layout.device.type}: {', '.join(parts)}"
