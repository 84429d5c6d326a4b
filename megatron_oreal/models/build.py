"""Builds Megatron's GPTModel from a Hugging Face config.json, one chunk per (virtual) pipeline stage of this rank."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_oreal.config import ModelConfig
from megatron_oreal.models.attention import PackedAttention, SequenceParallelRMSNorm
from megatron_oreal.models.fp8_layers import fp8_layer_settings
from megatron_oreal.models.heads import Head
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.weights.families import Architecture, canonical_name, parameter_rows
from megatron_oreal.weights.mapping import Row, find_row, padded_vocabulary
from megatron_oreal.weights.rotary import rotary_frequencies

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PackedGPTModel(GPTModel):
    """GPTModel over packed tokens that returns hidden states; the owner of the loss applies the head."""

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> tuple[Any, ...]:
        decoder_input, rotary, *rest = super()._preprocess(input_ids=input_ids, position_ids=position_ids, **kwargs)
        packed = kwargs.get("packed_seq_params")
        if packed is not None and packed.qkv_format == "sbhd":
            # The table has one row per token, not per position, so the rotary embedding needs no segments.
            rotary = rotary[position_ids[0]]
        return decoder_input, rotary, *rest

    def _postprocess(self, hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        return hidden_states


def resolved_for(config: ModelConfig, device: torch.device) -> ModelConfig:
    """Returns the configuration without `auto`, chosen by the device alone; run/device_defaults.py considers memory."""
    on_cuda = device.type == "cuda"
    dtype, recompute = config.dtype, config.recompute
    if dtype == "auto":
        dtype = "bfloat16" if on_cuda else "float32"
    if recompute == "auto":
        recompute = "full" if on_cuda else "none"
    return config.model_copy(update={"dtype": dtype, "recompute": recompute})


def uses_transformer_engine(config: ModelConfig, device: torch.device, context_size: int = 1) -> bool:
    """Says whether layers use Transformer Engine. Raises ValueError if it is requested and missing. Needs a dtype."""
    if config.implementation == "local":
        return False
    if context_size > 1:
        return False  # config/layout.py refuses a layout that requests it
    missing = ""
    if device.type != "cuda":
        missing = "it runs on CUDA only"
    elif config.dtype != "bfloat16":
        missing = "its attention over packed sequences needs model.dtype=bfloat16"
    elif not HAVE_TE:
        missing = "Megatron cannot import it"
    if missing and config.implementation == "transformer_engine":
        raise ValueError(f"model.implementation=transformer_engine, but {missing}; use auto")
    return not missing


def transformer_config(
    architecture: Architecture, config: ModelConfig, layout: ParallelLayout, transformer_engine: bool
) -> TransformerConfig:
    dtype = DTYPES[config.dtype]
    pipelined = layout.pipeline_size > 1
    recompute: dict[str, Any] = {}
    if config.recompute == "full":
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif config.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": list(config.recompute_modules)}
    fp8: dict[str, Any] = {}
    if config.fp8 is not None:
        fp8 = fp8_layer_settings(
            config.fp8,
            layout,
            transformer_engine,
            num_layers=architecture.num_layers,
            has_experts=architecture.experts is not None,
            num_bf16_ends=config.fp8_bf16_ends,
        )
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=layout.virtual_size if layout.virtual_size > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        # With two interleaved stages, Megatron would confuse the shapes of the two directions, so lengths must be equal
        # there.
        variable_seq_lengths=pipelined and layout.virtual_size == 1,
        # Variable lengths need alltoall, also in dense models; it runs on CUDA only.
        moe_token_dispatcher_type="alltoall" if pipelined or layout.device.type == "cuda" else "allgather",
        batch_p2p_comm=pipelined and layout.device.type == "cuda",
        perform_initialization=False,  # a checkpoint or the head initialises every parameter
        use_cpu_initialization=layout.device.type == "cpu",
        # The loss is already global, so Megatron must not divide by tokens or micro-batches; see
        # optimizer.finalize_gradients.
        calculate_per_token_loss=True,
        # Transformer Engine adds gradients of weights to main_grad inside the product; see OutputLayer.
        gradient_accumulation_fusion=transformer_engine,
        masked_softmax_fusion=False,
        persist_layer_norm=transformer_engine,
        # torch.compile makes SwiGLU one kernel, which keeps a third of the activations.
        bias_activation_fusion=layout.device.type == "cuda",
        bias_dropout_fusion=False,
        apply_rope_fusion=transformer_engine,
        **expert_settings(architecture, layout),
        **recompute,
        **fp8,
    )


def expert_settings(architecture: Architecture, layout: ParallelLayout) -> dict[str, Any]:
    """Returns Megatron's settings for a mixture of experts, without a load-balancing loss."""
    experts = architecture.experts
    if experts is None:
        return {}
    if layout.tensor_size > 1 and not layout.sequence_parallel:
        raise ValueError("parallel.sequence must be true for a mixture of experts under parallel.tensor > 1")
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.intermediate_size,
        "moe_router_topk": experts.num_per_token,
        # A softmax over the chosen experts equals the softmax over all experts, scaled to sum to one.
        "moe_router_pre_softmax": not experts.weights_sum_to_one,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def layer_spec(config: TransformerConfig, transformer_engine: bool, vp_stage: int | None) -> TransformerBlockSubmodules:
    spec = get_gpt_decoder_block_spec(
        config, use_transformer_engine=transformer_engine, normalization="RMSNorm", vp_stage=vp_stage
    )
    if transformer_engine:
        return spec
    spec.layer_norm = SequenceParallelRMSNorm
    for layer in spec.layer_specs:
        assert isinstance(layer, ModuleSpec)
        layer.submodules.input_layernorm = SequenceParallelRMSNorm
        layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = PackedAttention
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    return spec


def prepare_megatron_experts(device: torch.device) -> None:
    """Makes Megatron's expert layers run without Transformer Engine, and on a CPU."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # Megatron 0.16's router compares it with None without defining it
    if device.type == "cpu":
        # torch.compile fuses a few functions of these layers; it needs a compiler and an unpatched torch.cuda.
        torch.compiler.set_stance("force_eager")


class OutputLayer(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's output layer without gradient accumulation fusion, because that needs Apex.

    Only its weight is used. linear_logprob itself adds the gradient to main_grad.
    """

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        unfused = copy.copy(config)
        unfused.gradient_accumulation_fusion = False
        super().__init__(*args, config=unfused, **kwargs)


@contextmanager
def own_output_layer() -> Iterator[None]:
    """Makes GPTModel build an OutputLayer inside the block."""
    original = tensor_parallel.ColumnParallelLinear
    tensor_parallel.ColumnParallelLinear = OutputLayer
    try:
        yield
    finally:
        tensor_parallel.ColumnParallelLinear = original


def build_chunks(
    architecture: Architecture, head: Head, config: TransformerConfig, layout: ParallelLayout, transformer_engine: bool
) -> list[PackedGPTModel]:
    """Builds this rank's chunks on the layout's device. Only the head is initialised."""
    if architecture.experts:
        prepare_megatron_experts(layout.device)
    tied = architecture.tied_embeddings and head.kind == "lm"
    chunks = []
    for number in range(layout.virtual_size):
        vp_stage = number if layout.virtual_size > 1 else None
        is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        with own_output_layer():
            chunk = PackedGPTModel(
                config=config,
                transformer_layer_spec=layer_spec(config, transformer_engine, vp_stage),
                vocab_size=padded_vocabulary(architecture.vocab_size, layout.tensor_size),
                max_sequence_length=architecture.max_positions,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
                post_process=is_last,
                share_embeddings_and_output_weights=tied,
                position_embedding_type="rope",
                rotary_base=int(architecture.rope_theta),
                parallel_output=True,
                vp_stage=vp_stage,
            )
        # The table covers all positions; _preprocess selects those of this rank's tokens
        chunk.rotary_pos_emb.cp_group = None
        if architecture.rope_scaling:
            # Megatron's own scaling fixes three of the four numbers of this scaling.
            chunk.rotary_pos_emb.inv_freq = rotary_frequencies(
                architecture.rope_theta, architecture.head_dim, architecture.rope_scaling, layout.device
            )
        if is_last:
            head.attach(chunk, config)
        chunks.append(chunk.to(layout.device))
    mark_shards(chunks, parameter_rows(architecture, head.kind))
    return chunks


def mark_shards(chunks: list[PackedGPTModel], rows: list[Row]) -> None:
    """Marks the parameters that are shards. Megatron does so only when it initialises parameters."""
    for name, parameter in global_parameters(chunks):
        row, _ = find_row(rows, canonical_name(name))
        parameter.tensor_model_parallel = row.op.axis is not None  # type: ignore[attr-defined]


def global_parameters(chunks: list[PackedGPTModel]) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, parameter) of this rank, with layer numbers of the whole model."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter
