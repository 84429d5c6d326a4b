"""Log-probs of target tokens from hidden states and a vocabulary-parallel head, in tiles of tokens x vocabulary.

The float32 logits exist a tile at a time, but for those that are kept, within a bound (see tiles.py). A pass over them
leaves each token's maximum, sum of exponentials and target logit, for the entropy also a weighted sum; these are merged
over tiles, and over the tensor-parallel ranks with one all-gather. The gradients come in one of two modes:

recompute  hidden states, logsumexp and as many tiles of logits as there is room for are saved; the backward pass
           computes the others again. 3 matrix products for small vocabularies, up to 4 for large ones.
eager      the forward pass computes them, for d loss / d logprobs known up to a common factor. 3 matrix products.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oreal.kernels.gemms import Gemms, Precision
from megatron_oreal.kernels.gradients import _Gradients, common_factor, mark_main_grad
from megatron_oreal.kernels.precision import make_gemms
from megatron_oreal.kernels.tiles import TileLogits, Tiling
from megatron_oreal.kernels.vocabulary_reduction import _Call, row_kernels

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
    precision: Precision | Gemms = "bf16",
    mode: Mode = "recompute",
    token_scale: Tensor | None = None,  # [T]
    accumulate_main_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logprobs[T], logsumexp[T], entropy[T] or None) in float32 of softmax(hidden @ weight.T / temperature), in nats.

    All three are differentiable with respect to hidden and weight. Under tensor parallelism every rank passes the same
    hidden states and targets, and the gradient of hidden is the whole one. Columns from `valid_vocab` on (global count)
    are padding and have no probability. A token whose hidden state is not finite has NaN.

    `precision="bf16"` multiplies half-precision inputs as they are, into float32 logits; float32 inputs, and all inputs
    on a CPU, are multiplied in float32. "fp8_grad" has FP8 products for the gradients, "fp8" for the logits too;
    products with options of their own are passed as an object.

    `mode="eager"` is for a loss of sum_t token_scale[t] * logprobs[t] times any one number: supervised fine-tuning,
    REINFORCE, a policy gradient at ratio 1. Only logprobs is differentiable then, and once. A gradient that is not a
    multiple of `token_scale` raises ValueError on a CPU, and makes the gradients NaN elsewhere.

    `accumulate_main_grad` adds the weight's gradient to its `main_grad`, if it has one, as Megatron's gradient
    accumulation fusion does: `grad_added_to_main_grad` is set, and autograd sees none.

    A half-precision gradient of the weight is summed in float32 where there are more than MAX_ROUNDINGS blocks of
    tokens: twice its bytes, until it is whole. A float32 main_grad needs nothing.

    Raises ValueError for mismatched shapes or dtypes, a temperature or valid_vocab out of range, targets outside the
    vocabulary, and a precision that this device does not have.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    check_inputs(hidden, weight, target, tp_group, valid_vocab)
    check_mode(mode, target, token_scale)
    first = weight.shape[0] * (tp_group.rank() if tp_group else 0)
    call = _Call(
        gemms=make_gemms(precision, hidden.device, hidden.dtype) if isinstance(precision, str) else precision,
        rows=row_kernels(hidden.device.type),
        group=tp_group if tp_group is not None and tp_group.size() > 1 else None,
        first=first,
        num_valid=weight.shape[0] if valid_vocab is None else max(0, min(weight.shape[0], valid_vocab - first)),
        temperature=temperature,
        with_entropy=entropy,
        fused_weight=weight if accumulate_main_grad and hasattr(weight, "main_grad") else None,
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
    # On an accelerator the comparison would stall the queue: there a stray target gives -inf.
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


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, call: _Call, wants_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        numbers = torch.empty(call.num_numbers, len(target), dtype=torch.float32, device=hidden.device)
        sizes, compute = call.sizes(hidden, weight), call.compute(hidden, weight)
        tiling = Tiling.square(sizes)
        logits = TileLogits(tiling, sizes.kept_bytes if wants_gradient else 0, not hidden.is_cuda)
        parts = []
        for rows in tiling.tokens:
            tiles = logits.first(rows, compute)
            numbers[:, rows], part = call.reduce(tiles, hidden[rows], weight, target[rows])
            if wants_gradient:
                parts.append(part)
        logits.end_pass()
        logprobs, logsumexp, entropy = call.outputs(numbers)
        ctx.save_for_backward(hidden, weight, target, logsumexp, entropy)
        ctx.call, ctx.logits, ctx.exact = call, logits, parts
        ctx.set_materialize_grads(False)  # an output without a gradient costs nothing
        return logprobs, logsumexp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, target, logsumexp, entropy = ctx.saved_tensors
        call: _Call = ctx.call
        zeros = torch.zeros_like(logsumexp)
        of_logprobs, of_logsumexp, of_entropy = (zeros if grad is None else grad for grad in grads)
        # d logprob = onehot - p, d logsumexp = p, d entropy = -p (z - logsumexp + entropy)
        scales = torch.stack([of_logprobs, of_logsumexp - of_logprobs, of_entropy]) / call.temperature
        used_entropy = None if grads[2] is None else entropy
        logits: TileLogits = ctx.logits
        blocks = logits.tiling.tokens
        gradients = _Gradients(call, hidden, weight, ctx.needs_input_grad[:2], fused=True, num_blocks=len(blocks))
        for rows, exact in zip(blocks, ctx.exact, strict=True):
            gradients.add(
                rows,
                exact.put_into(logits.again(rows, call.compute(hidden, weight))),
                target[rows],
                logsumexp[rows],
                None if used_entropy is None else used_entropy[rows],
                scales[:, rows],
            )
        logits.end_pass()
        return *gradients.finish(), None, None, None


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, call: _Call, token_scale: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        token_scale = token_scale.detach().float()
        scales = torch.stack([token_scale, -token_scale, torch.zeros_like(token_scale)]) / call.temperature
        results = torch.empty(3, len(target), dtype=torch.float32, device=hidden.device)
        sizes, compute = call.sizes(hidden, weight), call.compute(hidden, weight)
        tiling = Tiling.eager(sizes)
        num_blocks = len(tiling.tokens)
        gradients = _Gradients(call, hidden, weight, ctx.needs_input_grad[:2], fused=False, num_blocks=num_blocks)
        logits = TileLogits(tiling, tiling.row_bytes, not hidden.is_cuda)
        for rows in tiling.tokens:
            tiles = list(logits.first(rows, compute))
            numbers, exact = call.reduce(tiles, hidden[rows], weight, target[rows])
            logprobs, logsumexp, entropy = call.outputs(numbers)
            results[0, rows], results[1, rows] = logprobs, logsumexp
            if entropy is not None:
                results[2, rows] = entropy
            gradients.add(rows, exact.put_into(tiles), target[rows], logsumexp, None, scales[:, rows])
            del tiles  # before the next ones are made
            logits.forget()
        ctx.call, ctx.gradients, ctx.token_scale = call, gradients.finish(), token_scale
        logprobs, logsumexp, entropy = results.clone().unbind()
        ctx.mark_non_differentiable(logsumexp, entropy)
        return logprobs, logsumexp, entropy if call.with_entropy else None

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        if ctx.gradients is None:
            raise RuntimeError("mode=eager has one backward pass: its gradients are gone")
        of_hidden, of_weight = ctx.gradients
        ctx.gradients = None
        factor = common_factor(grad_logprobs, ctx.token_scale)
        if of_hidden is not None:
            of_hidden.mul_(factor)
        if of_weight is not None and call.fused_weight is not None:
            call.fused_weight.main_grad.addcmul_(of_weight, factor.to(of_weight.dtype))  # type: ignore[attr-defined]
            mark_main_grad(call)
            of_weight = None
        elif of_weight is not None:
            of_weight.mul_(factor)
        return of_hidden, of_weight, None, None, None
