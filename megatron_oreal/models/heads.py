"""Defines the last layer of a model: log-probs over the vocabulary, or one number per token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_oreal.config import HeadBackend, HeadFp8, HeadInit
from megatron_oreal.engines.local.token_sampling import truncate
from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.fp8.scaled import Fp8Options
from megatron_oreal.kernels.kept_logprob import KeptTokens, Vocabulary, choose_kept, kept_logprob
from megatron_oreal.kernels.liger_logprob import LigerCall
from megatron_oreal.kernels.precision import check_fp8, make_arithmetic
from megatron_oreal.kernels.products import Precision
from megatron_oreal.models.head_backend import choose_operator
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Microbatch, TokenOutputs
from megatron_oreal.weights.families import HeadKind


class Head(Protocol):
    @property
    def kind(self) -> HeadKind: ...

    def attach(self, model: Any, config: TransformerConfig) -> None:
        """Gives the last stage's GPTModel the parameters of this head."""
        ...

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs: ...


def whole_sequence(hidden: Tensor, layout: ParallelLayout) -> Tensor:
    """Gathers [T or T / tensor_size, 1, H] to [T, H]. The heads' gradients are complete, so backward only slices."""
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.squeeze(1)


FP8_OPTIONS: dict[HeadFp8, Fp8Options] = {
    "torch": Fp8Options("torch"),
    "transformer_engine_tensor": Fp8Options("transformer_engine", "tensor"),
    "transformer_engine_block": Fp8Options("transformer_engine", "block"),
    "transformer_engine_mx": Fp8Options("transformer_engine", "mx"),
}


@dataclass(frozen=True, slots=True)
class Truncation:
    """Sets logits of tokens that the samplers never draw to -inf: [t, V] -> [t, V]."""

    top_k: int
    top_p: float

    def __call__(self, logits: Tensor) -> Tensor:
        return truncate(logits, self.top_k, self.top_p)


@dataclass(frozen=True, slots=True)
class LogprobHead:
    """Log-probs and entropies of the labels in the loss mask, 0 elsewhere. Only their tokens reach the head.

    Both belong to the distribution at `temperature`, over the whole vocabulary or, with a `truncation`, within the
    tokens that it keeps. The first pass over a micro-batch, with the policy that sampled, selects these tokens, and
    later passes reuse them.
    """

    layout: ParallelLayout
    vocab_size: int  # without padding
    kind: HeadKind = "lm"
    precision: Precision = "bf16"  # of the products, see linear_logprob
    fp8: HeadFp8 = "torch"  # the FP8 products for precision fp8_grad
    temperature: float = 1.0  # of the sampled and trained distribution softmax(logits / temperature)
    # top_k and top_p of the sampled distribution, if the losses use only its tokens
    truncation: Truncation | None = None
    backend: HeadBackend = "own"
    max_tokens: int = 0  # of a micro-batch, for a backend that needs its largest size in advance

    def __post_init__(self) -> None:
        """Raises ValueError naming what this device lacks for FP8."""
        if self.precision == "fp8_grad":
            check_fp8(self.layout.device, FP8_OPTIONS[self.fp8])

    def attach(self, model: Any, config: TransformerConfig) -> None:
        """Uses GPTModel's own output layer as the head's weight. Raises ValueError if the backend is not available."""
        model.liger_operator = None
        if self.precision == "bf16" and self.truncation is None:
            call = LigerCall(self.max_tokens, config.hidden_size, model.vocab_size // self.layout.tensor_size)
            model.liger_operator = choose_operator(
                self.backend, call, dtype=config.params_dtype, vocab_size=self.vocab_size, layout=self.layout
            )

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs:
        shared = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
        trained = microbatch.trained
        selected = whole_sequence(hidden, self.layout).index_select(0, trained)
        hidden, labels = selected.to(weight.dtype), microbatch.labels[trained]
        group = self.layout.tensor_group if self.layout.tensor_size > 1 else None
        if self.truncation is not None:
            products = make_arithmetic(self.precision, hidden.device, hidden.dtype).products
            vocabulary = Vocabulary(products, self.temperature, self.vocab_size, group)
            if microbatch.kept_tokens is None:
                microbatch.kept_tokens = choose_kept(hidden, weight, labels, vocabulary, self.truncation)
            assert isinstance(microbatch.kept_tokens, KeptTokens)
            logprobs, entropies = kept_logprob(hidden, weight, labels, microbatch.kept_tokens, vocabulary)
            return spread_outputs(logprobs, entropies, microbatch)
        operator = getattr(model, "liger_operator", None)
        if operator is not None and operator.fits(len(labels)):
            logprobs, entropies = operator(hidden, weight, labels, self.temperature)
            return spread_outputs(logprobs, entropies, microbatch)
        logprobs, _, entropy = linear_logprob(
            hidden,
            weight,
            labels,
            tp_group=group,
            temperature=self.temperature,
            valid_vocab=self.vocab_size,
            entropy=True,
            precision=make_arithmetic(self.precision, hidden.device, hidden.dtype, FP8_OPTIONS[self.fp8]),
            # This applies if Megatron's data parallelism made a main_grad, whether or not its layers use fusion.
            accumulate_main_grad=True,
            placeholder_gradient=True,
        )
        assert entropy is not None
        return spread_outputs(logprobs, entropy, microbatch)


def spread_outputs(logprobs: Tensor, entropy: Tensor, microbatch: Microbatch) -> TokenOutputs:
    """Puts the values of the trained tokens at their positions, with zeros elsewhere."""
    empty = torch.zeros(len(microbatch.labels), dtype=torch.float32, device=logprobs.device)
    trained = microbatch.trained
    return TokenOutputs(values=empty.index_copy(0, trained, logprobs), entropy=empty.index_copy(0, trained, entropy))


class ScalarProjection(torch.nn.Module):
    """Linear(hidden, 1) without bias, replicated over tensor parallelism."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)  # [1, H]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(self.state_dict(), prefix, {}, sharded_offsets)  # type: ignore[no-any-return]


# Open-Reasoner-Zero's code draws from a normal distribution with standard deviation 1 / (H + 1). Its paper says U(-sqrt
# 5, sqrt 5), which probably means torch's kaiming_uniform_(a=sqrt 5), that is U(-1 / sqrt H, 1 / sqrt H). Read
# literally, initial values would have a standard deviation of 77 at H = 3584, while returns lie in [0, 1].
HEAD_INITS: dict[HeadInit, Callable[[Tensor, torch.Generator], Tensor]] = {
    "zero": lambda weight, _generator: weight,
    "kaiming_uniform": lambda weight, generator: weight.uniform_(
        -1 / math.sqrt(weight.shape[1]), 1 / math.sqrt(weight.shape[1]), generator=generator
    ),
    "normal": lambda weight, generator: weight.normal_(std=1 / (weight.shape[1] + 1), generator=generator),
}


@dataclass(frozen=True, slots=True)
class ScalarHead:
    """One float32 score per token, for reward model and critic."""

    layout: ParallelLayout
    init: HeadInit = "zero"
    seed: int = 0
    kind: HeadKind = "scalar"

    def attach(self, model: Any, config: TransformerConfig) -> None:
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU, so that every rank gets the same weights
        weight = HEAD_INITS[self.init](torch.zeros(1, config.hidden_size), generator)
        model.output_layer = ScalarProjection(weight.to(config.params_dtype))

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs:
        scores = whole_sequence(hidden, self.layout).float() @ model.output_layer.weight.float().T
        return TokenOutputs(values=scores[:, 0], entropy=None)
