"""Writes megatron-core's torch_dist checkpoints, without a model, a process group or a GPU.

    DIR/latest_checkpointed_iteration.txt    "release", or an iteration's number
    DIR/release/.metadata                    which tensors there are, and where each chunk of them is
    DIR/release/__<n>_0.distcp               chunks, each a small file of torch.save
    DIR/release/common.pt, metadata.json     further files that Megatron-LM --load asks for

Every tensor is described with its whole shape over all parallel ranks, and with layers (and experts) as its first
dimensions, so that a checkpoint fits every layout.
"""

from __future__ import annotations

import json
import pickle
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_oreal.weights.families import TRANSFORMER_ENGINE_ALIASES, Architecture, HeadKind
from megatron_oreal.weights.mapping import Place, Row, pad_rows

TRACKER, ITERATION = "latest_checkpointed_iteration.txt", "release"
VOCABULARY_MULTIPLE = 128  # Megatron-LM's default of --make-vocab-size-divisible-by
ALIGNMENT = 64  # bytes; each chunk begins at a multiple of it in its file
NORM_KEYS = {canonical: key for key, canonical in TRANSFORMER_ENGINE_ALIASES.items()}


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A part of a tensor, and its place in the files."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int  # bytes
    length: int


# ---- names ----------------------------------------------------------------------------------------------------------


def stored_keys(row: Row, architecture: Architecture) -> list[str]:
    """Returns the names of the tensor that holds a row's parameters of all layers; usually there is one."""
    if not row.exported:  # tied to the embedding
        return ["embedding.word_embeddings.weight"]
    key = row.megatron.replace(".{layer}.", ".").replace("local_experts.{expert}.", "experts.")
    for canonical, fused in NORM_KEYS.items():
        if key == f"decoder.layers.{canonical}":
            fused_key = f"decoder.layers.{fused}"
            # Before experts, local layers expect the fused name of the norm, Transformer Engine's layers the plain one.
            return [fused_key, key] if architecture.experts and canonical.startswith("pre_mlp") else [fused_key]
    return [key]


def stacked_sizes(row: Row, architecture: Architecture) -> tuple[int, ...]:
    """Returns the sizes of the dimensions that stand before the parameter's own."""
    layers = (architecture.num_layers,) if "{layer}" in row.megatron else ()
    return (*layers, architecture.num_experts) if "{expert}" in row.megatron else layers


def stacked_offsets(place: Place) -> tuple[int, ...]:
    return tuple(number for number in (place.layer, place.expert) if number is not None)


def extra_state_keys(architecture: Architecture) -> list[str]:
    """Returns the keys of empty objects that Megatron demands beside modules; further ones do no harm."""
    attention = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
    modules = [*(f"self_attention.{name}" for name in attention), "input_layernorm", "pre_mlp_layernorm"]
    num_layers, num_experts = architecture.num_layers, architecture.num_experts
    if not num_experts:
        modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    keys = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for layer in range(num_layers):
        keys += [f"decoder.layers.{module}._extra_state/shard_{layer}_{num_layers}" for module in modules]
        keys += [
            f"decoder.layers.mlp.experts.experts.{module}._extra_state/"
            f"shard_{layer}.{expert}_{num_layers}.{num_experts}"
            for module in ("linear_fc1", "linear_fc2")
            for expert in range(num_experts)
        ]
    return keys


# ---- writing --------------------------------------------------------------------------------------------------------


def write_parameter(
    file: IO[bytes], row: Row, place: Place, tensors: Sequence[Tensor], architecture: Architecture, padded_rows: int
) -> list[StoredChunk]:
    """Makes a parameter of its Hugging Face tensors and appends it to a .distcp file. Returns where its chunks are."""
    merged = row.op.merge(tensors)
    if row.pads_vocabulary:
        merged = pad_rows(merged, padded_rows)
    offsets = (*stacked_offsets(place), *(0 for _ in merged.shape))
    sizes = (*(1 for _ in stacked_offsets(place)), *merged.shape)
    begin, length = write_object(file, merged.contiguous().reshape(sizes))
    name = Path(file.name).name
    # The two names of one norm share its bytes.
    return [StoredChunk(key, offsets, sizes, name, begin, length) for key in stored_keys(row, architecture)]


def write_object(file: IO[bytes], content: Any) -> tuple[int, int]:
    file.write(bytes(-file.tell() % ALIGNMENT))
    begin = file.tell()
    torch.save(content, file)
    return begin, file.tell() - begin


def write_metadata(
    directory: Path,
    chunks: Iterable[StoredChunk],
    sizes: dict[str, tuple[int, ...]],
    dtypes: dict[str, torch.dtype],
    architecture: Architecture,
) -> None:
    """Writes .metadata, the last file of an iteration; `sizes` and `dtypes` are those of the whole tensors, by key."""
    described: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtypes[key]), torch.Size(size), [])
        for key, size in sizes.items()
    }
    storage: dict[MetadataIndex, filesystem._StorageInfo] = {}
    for chunk in chunks:
        described[chunk.key].chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)))
        index = MetadataIndex(chunk.key, chunk.offsets)
        storage[index] = filesystem._StorageInfo(chunk.file, chunk.begin, chunk.length)
    extra, indices = write_extra_states(directory, architecture)
    described |= {index.fqn: state for index, state in indices.items()}
    storage |= dict.fromkeys(indices, extra)
    metadata = Metadata(described, None, storage, StorageMeta(), "1.0.0")
    with (directory / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)


def write_extra_states(
    directory: Path, architecture: Architecture
) -> tuple[filesystem._StorageInfo, dict[MetadataIndex, BytesStorageMetadata]]:
    """Writes the one empty object that stands for all of `extra_state_keys`. Returns where it is, and their names."""
    with (directory / "__extra_0.distcp").open("wb") as file:
        begin, length = write_object(file, [None])
    stored = filesystem._StorageInfo("__extra_0.distcp", begin, length)
    return stored, {MetadataIndex(key): BytesStorageMetadata() for key in extra_state_keys(architecture)}


def write_companions(directory: Path, architecture: Architecture, head: HeadKind, padded_rows: int) -> None:
    """Writes the files that Megatron-LM itself reads."""
    versions = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(
        json.dumps(versions | {"common_backend": "torch", "common_backend_version": 1})
    )
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, "non_homogeneous_layers": False}
    common = {
        "args": megatron_arguments(architecture, head, padded_rows),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": content,
    }
    torch.save(common, directory / "common.pt")


def megatron_arguments(architecture: Architecture, head: HeadKind, padded_rows: int) -> Namespace:
    """Returns what Megatron-LM compares its arguments with, and sets them from with --use-checkpoint-args.

    --norm-epsilon, --qk-layernorm and --use-rope-scaling it takes from no checkpoint: they are noted to be looked up.
    The tokenizer's are left out: it would prefer them to those that were given.
    """
    experts, scaling = architecture.experts, architecture.rope_scaling
    theta = architecture.rope_theta
    return Namespace(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_heads,
        group_query_attention=architecture.num_kv_heads != architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        max_position_embeddings=architecture.max_positions,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=True,
        rotary_base=int(theta) if theta.is_integer() else theta,  # --rotary-base is a whole number
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if scaling else 1.0,
        normalization="RMSNorm",
        norm_epsilon=architecture.norm_eps,
        apply_layernorm_1p=False,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not architecture.tied_embeddings,
        make_vocab_size_divisible_by=VOCABULARY_MULTIPLE,
        padded_vocab_size=padded_rows,
        num_experts=experts.count if experts else None,
        moe_ffn_hidden_size=experts.intermediate_size if experts else None,
        moe_layer_freq=1,
        moe_router_topk=experts.num_per_token if experts else 2,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=experts is not None and not experts.weights_sum_to_one,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        data_parallel_random_init=False,
        ckpt_format="torch_dist",
        no_save_optim=True,  # also where the directory is not taken for a release
        no_save_rng=True,
        head=head,  # ours
    )
