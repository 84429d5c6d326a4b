"""Computes target tokens' log-probs from hidden states and a vocabulary-parallel head, without float32 logits [T, V].

Only one tile of tokens x vocabulary of the float32 logits exists at a time. A pass over a tile computes each token's
maximum, sum of exponentials and target logit, and for the entropy a weighted sum; these are merged over tiles, and over
the tensor-parallel ranks with one all-gather. One of two modes computes the gradients:

recompute  The forward pass keeps what fits into the memory bound: on a CPU float32 logits, on a GPU their exponentials
           in bfloat16. The backward pass recomputes the rest: 3 matrix products if all is kept, at most 4.
eager      The forward pass computes the gradients, for d loss / d logprobs known up to a common factor. 3 products.

README.md has the equations, the memory bounds and the measurements.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.kernels.block_passes import BlockPasses
from megatron_oreal.kernels.gradients import GradientSums, common_factor, mark_main_grad
from megatron_oreal.kernels.precision import Arithmetic, make_arithmetic
from megatron_oreal.kernels.products import Precision
from megatron_oreal.kernels.tile_passes import TilePasses
from megatron_oreal.kernels.tiles import bytes_of_a_call
from megatron_oreal.kernels.vocabulary_reduction import Call, Upstream, row_kernels

Mode = Literal["recompute", "eager"]


def linear_logprob(
    hidden: Tensor,  # [T, H]
    weight: Tensor,  # [V, H], this rank's slice of the vocabulary
    target: Tensor,  # [T] int64, global token ids
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    entropy: bool = False,
    precision: Precision | Arithmetic = "bf16",
    mode: Mode = "recompute",
    token_scale: Tensor | None = None,  # [T]
    accumulate_main_grad: bool = False,
    placeholder_gradient: bool = False,
    memory_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (logprobs, logsumexp, entropy or None), each [T] float32, of softmax(hidden @ weight.T / temperature).

    The unit of all three is nats.

    All three are differentiable with respect to hidden and weight. Under tensor parallelism every rank passes the same
    hidden states and targets, and the gradient of hidden is the whole one. Columns from `valid_vocab` on (global count)
    are padding and have no probability. A token whose hidden state is not finite has NaN.

    `precision="bf16"` multiplies half-precision inputs as they are, into float32 logits; float32 inputs, and all inputs
    on a CPU, are multiplied in float32. "fp8_grad" computes the gradients by FP8 products; the log-probs are
    those of "bf16". Pass an object for an arithmetic that has options.

    `mode="eager"` is for a loss that is one number times sum_t token_scale[t] * logprobs[t]: supervised fine-tuning,
    REINFORCE, a policy gradient at ratio 1. Then only logprobs is differentiable, and only once. A gradient
    that is not a multiple of `token_scale` raises ValueError on a CPU, and makes the gradients NaN elsewhere.

    `accumulate_main_grad` adds the weight's gradient to its `main_grad`, if it has one, as Megatron's gradient
    accumulation fusion does: `grad_added_to_main_grad` is set, and autograd sees none. With `placeholder_gradient`
    autograd sees an uninitialised gradient instead: Megatron's overlapped reduction of gradients waits for one, and
    discards it. A weight with `zero_out_wgrad` gets none, because Megatron adds what autograd has of it.

    `memory_bytes` bounds what the call holds beyond inputs and gradients; default: tiles.CPU_BYTES or CUDA_BYTES. More
    memory saves recomputation.

    With more than MAX_ROUNDINGS blocks of tokens, a half-precision gradient of the weight is summed in float32, which
    takes twice its bytes until the sum is complete. A float32 main_grad needs no extra memory.

    Raises ValueError for mismatched shapes or dtypes, a temperature or valid_vocab out of range, targets outside the
    vocabulary, and a precision that this device does not have.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    check_inputs(hidden, weight, target, tp_group, valid_vocab)
    check_mode(mode, target, token_scale)
    first = weight.shape[0] * (tp_group.rank() if tp_group else 0)
    device_type, is_cuda = hidden.device.type, hidden.is_cuda
    chosen = make_arithmetic(precision, hidden.device, hidden.dtype) if isinstance(precision, str) else precision
    call = Call(
        products=chosen.products,
        rows=row_kernels(device_type),
        block_gradients=None if chosen.make_gradients is None else chosen.make_gradients(),
        memory_bytes=bytes_of_a_call(is_cuda) if memory_bytes is None else memory_bytes,
        group=tp_group if tp_group is not None and tp_group.size() > 1 else None,
        first=first,
        num_valid=weight.shape[0] if valid_vocab is None else max(0, min(weight.shape[0], valid_vocab - first)),
        temperature=temperature,
        with_entropy=entropy,
        fused_weight=weight if accumulate_main_grad and hasattr(weight, "main_grad") else None,
        with_placeholder=placeholder_gradient,
    )
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    outputs: tuple[Tensor, Tensor, Tensor | None]
    if mode == "eager" and wants_gradient:
        outputs = _Eager.apply(hidden, weight, target, call, token_scale)
    else:
        outputs = _Recompute.apply(hidden, weight, target, call, wants_gradient)
    return outputs


def check_inputs(
    hidden: Tensor, weight: Tensor, target: Tensor, group: dist.ProcessGroup | None, valid_vocab: int | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [T, H] and [V, H]")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must have one token id a row of hidden, {hidden.shape[0]}, got {tuple(target.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them")
    columns = weight.shape[0] * (group.size() if group else 1)
    vocabulary = columns if valid_vocab is None else valid_vocab
    if not 1 <= vocabulary <= columns:
        raise ValueError(f"valid_vocab must be in [1, {columns}], the columns of all ranks, got {vocabulary}")
    # On an accelerator, the comparison would block the host; an invalid target gives -inf there.
    if target.device.type == "cpu" and target.numel() and not 0 <= int(target.min()) <= int(target.max()) < vocabulary:
        raise ValueError(f"target must hold ids in [0, {vocabulary}), got [{int(target.min())}, {int(target.max())}]")


def check_mode(mode: Mode, target: Tensor, token_scale: Tensor | None) -> None:
    if mode not in ("recompute", "eager"):
        raise ValueError(f"mode must be recompute or eager, got {mode}")
    if mode == "recompute" and token_scale is not None:
        raise ValueError("token_scale belongs to mode=eager: set that, or leave it out")
    if mode == "eager" and (token_scale is None or token_scale.shape != target.shape):
        found = None if token_scale is None else tuple(token_scale.shape)
        raise ValueError(f"mode=eager needs token_scale, one number a target, {len(target)}, got {found}")


Passes = TilePasses | BlockPasses


def make_passes(call: Call, hidden: Tensor, weight: Tensor, *, is_eager: bool, keeps: bool) -> Passes:
    if call.block_gradients is None:
        return TilePasses(call, hidden, weight, is_eager, keeps)
    return BlockPasses(call, call.block_gradients, hidden, weight, is_eager, keeps)


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, call: Call, wants_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        numbers = torch.empty(call.num_numbers, len(target), dtype=torch.float32, device=hidden.device)
        passes = make_passes(call, hidden, weight, is_eager=False, keeps=wants_gradient)
        for rows in passes.tokens:
            numbers[:, rows] = passes.reduce(hidden, weight, target, rows)
        passes.end_pass()
        logprobs, logsumexp, entropy = call.outputs(numbers)
        ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
        ctx.call, ctx.passes = call, passes
        ctx.set_materialize_grads(False)  # no work for an output without a gradient
        return logprobs, logsumexp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        call: Call = ctx.call
        zeros = torch.zeros_like(logsumexp)
        of_logprobs, of_logsumexp, of_entropy = (zeros if grad is None else grad for grad in grads)
        # d logprob = onehot - p, d logsumexp = p, d entropy = -p (z - logsumexp + entropy)
        scales = torch.stack([of_logprobs, of_logsumexp - of_logprobs, of_entropy]) / call.temperature
        upstream = Upstream(target, logsumexp, None if grads[2] is None else entropy, scales)
        passes: Passes = ctx.passes
        num_blocks = len(passes.tokens)
        sums = GradientSums(call, hidden, weight, ctx.needs_input_grad[:2], fused=True, num_blocks=num_blocks)
        for rows in passes.tokens:
            passes.add_gradients(sums, hidden, weight, upstream, rows)
        passes.end_pass()
        return *sums.finish(), None, None, None


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, call: Call, token_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        token_scale = token_scale.detach().float()
        scales = torch.stack([token_scale, -token_scale, torch.zeros_like(token_scale)]) / call.temperature
        results = torch.empty(3, len(target), dtype=torch.float32, device=hidden.device)
        passes = make_passes(call, hidden, weight, is_eager=True, keeps=True)
        num_blocks = len(passes.tokens)
        sums = GradientSums(call, hidden, weight, ctx.needs_input_grad[:2], fused=False, num_blocks=num_blocks)
        for rows in passes.tokens:
            logprobs, logsumexp, entropy = call.outputs(passes.reduce(hidden, weight, target, rows))
            results[0, rows], results[1, rows] = logprobs, logsumexp
            if entropy is not None:
                results[2, rows] = entropy
            passes.add_gradients(sums, hidden, weight, Upstream(target, results[1], None, scales), rows)
            passes.end_block()
        ctx.call, ctx.gradients, ctx.token_scale = call, sums.finish(), token_scale
        logprobs, logsumexp, entropy = results.clone().unbind()
        ctx.mark_non_differentiable(logsumexp, entropy)
        return logprobs, logsumexp, entropy if call.with_entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        if ctx.gradients is None:
            raise RuntimeError("mode=eager has one backward pass: its gradients are gone")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        factor = common_factor(grad_logprobs, ctx.token_scale)
        if of_hidden is not None:
            of_hidden.mul_(factor)
        if of_weight is not None and call.fused_weight is not None:
            call.fused_weight.main_grad.addcmul_(of_weight, factor.to(of_weight.dtype))  # type: ignore[attr-defined]
            of_weight = mark_main_grad(call)
        elif of_weight is not None:
            of_weight.mul_(factor)
        return of_hidden, of_weight, None, None, None
