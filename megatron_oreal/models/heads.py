"""What ends a model: log-probs over the vocabulary, or one number a token. The model does not know which."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_oreal.config import HeadFp8, HeadInit
from megatron_oreal.kernels import linear_logprob
from megatron_oreal.kernels.fp8.gate import GuardedPrecision
from megatron_oreal.kernels.fp8.scaled import Fp8Options
from megatron_oreal.kernels.gemms import Gemms, Precision
from megatron_oreal.kernels.precision import make_fp8_gemms, make_products
from megatron_oreal.parallel.layout import ParallelLayout
from megatron_oreal.types import Microbatch, TokenOutputs
from megatron_oreal.weights.families import Head as HeadKind


class Head(Protocol):
    @property
    def kind(self) -> HeadKind: ...

    def attach(self, model: Any, config: TransformerConfig) -> None:
        """Gives the last stage's GPTModel the parameters of this head."""
        ...

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs: ...


def whole_sequence(hidden: Tensor, layout: ParallelLayout) -> Tensor:
    """[T or T / tensor_size, 1, H] -> [T, H]. The heads' gradients are whole already: its backward only slices."""
    if layout.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
    return hidden.squeeze(1)


FP8_OPTIONS: dict[HeadFp8, Fp8Options] = {
    "torch_row": Fp8Options("torch", "row"),
    "torch_tensor": Fp8Options("torch", "tensor"),
    "transformer_engine_tensor": Fp8Options("transformer_engine", "tensor"),
    "transformer_engine_block": Fp8Options("transformer_engine", "block"),
    "transformer_engine_mx": Fp8Options("transformer_engine", "mx"),
}


@dataclass(frozen=True, slots=True)
class LogprobHead:
    """Log-probs and entropies of the labels in the loss mask, 0 elsewhere: only those tokens meet the head."""

    layout: ParallelLayout
    vocab_size: int  # without padding
    kind: HeadKind = "lm"
    precision: InitVar[Precision] = "bf16"  # of the products, see linear_logprob
    fp8: HeadFp8 = "torch_row"  # how, where the precision is FP8
    guard: GuardedPrecision = field(init=False)  # FP8 values, as long as they are good enough

    def __post_init__(self, precision: Precision) -> None:
        """Raises ValueError naming what FP8 lacks on this device."""
        if is_fp8(precision):
            make_products(FP8_OPTIONS[self.fp8], self.layout.device)
        object.__setattr__(self, "guard", GuardedPrecision(precision))

    def attach(self, model: Any, config: TransformerConfig) -> None:
        """GPTModel's own output layer is the head's weight."""

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs:
        shared = model.share_embeddings_and_output_weights
        weight = model.shared_embedding_or_output_weight() if shared else model.output_layer.weight
        trained = microbatch.trained
        selected = whole_sequence(hidden, self.layout).index_select(0, trained)
        hidden, labels = selected.to(weight.dtype), microbatch.labels[trained]
        compute = partial(
            linear_logprob,
            tp_group=self.layout.tensor_group if self.layout.tensor_size > 1 else None,
            valid_vocab=self.vocab_size,
        )

        def measured(precision: Precision, tokens: slice) -> Tensor:
            return compute(hidden[tokens], weight, labels[tokens], precision=self.products(precision, hidden))[0]

        if note := self.guard.check(len(labels), measured):
            warnings.warn(f"model.head_precision: {note}", stacklevel=1)
        logprobs, _, entropy = compute(
            hidden,
            weight,
            labels,
            entropy=True,
            precision=self.products(self.guard.precision, hidden),
            accumulate_main_grad=True,  # where Megatron's data parallelism has made one, whatever its layers do
        )
        assert entropy is not None
        empty = torch.zeros(len(microbatch.labels), dtype=torch.float32, device=hidden.device)
        return TokenOutputs(
            values=empty.index_copy(0, trained, logprobs), entropy=empty.index_copy(0, trained, entropy)
        )

    def products(self, precision: Precision, hidden: Tensor) -> Precision | Gemms:
        if not is_fp8(precision):
            return precision
        return make_fp8_gemms(
            hidden.device, hidden.dtype, with_values=precision == "fp8", options=FP8_OPTIONS[self.fp8]
        )


def is_fp8(precision: Precision) -> bool:
    return precision in ("fp8_grad", "fp8")


class ScalarProjection(torch.nn.Module):
    """Linear(hidden, 1) without bias, replicated over tensor parallelism."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)  # [1, H]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(self.state_dict(), prefix, {}, sharded_offsets)  # type: ignore[no-any-return]


# Of Open-Reasoner-Zero: its paper draws from U(-sqrt 5, sqrt 5), its code from N(0, 1 / (hidden + 1)).
HEAD_INITS: dict[HeadInit, Callable[[Tensor, torch.Generator], Tensor]] = {
    "zero": lambda weight, _generator: weight,
    "uniform": lambda weight, generator: weight.uniform_(-math.sqrt(5), math.sqrt(5), generator=generator),
    "normal": lambda weight, generator: weight.normal_(std=1 / (weight.shape[1] + 1), generator=generator),
}


@dataclass(frozen=True, slots=True)
class ScalarHead:
    """One score a token, for reward model and critic, in float32."""

    layout: ParallelLayout
    init: HeadInit = "zero"
    seed: int = 0
    kind: HeadKind = "scalar"

    def attach(self, model: Any, config: TransformerConfig) -> None:
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: the same weights on every rank
        weight = HEAD_INITS[self.init](torch.zeros(1, config.hidden_size), generator)
        model.output_layer = ScalarProjection(weight.to(config.params_dtype))

    def __call__(self, model: Any, hidden: Tensor, microbatch: Microbatch) -> TokenOutputs:
        scores = whole_sequence(hidden, self.layout).float() @ model.output_layer.weight.float().T
        return TokenOutputs(values=scores[:, 0], entropy=None)
