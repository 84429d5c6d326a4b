"""Chooses what computes a head's log-probs: our own kernels, or Liger's operator (model.head_backend).

`auto` is our own: on an H200 they were faster than the operator at every shape that was measured, forward and backward,
and more exact (tools/bench/results/2026-11-28_h200.md).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_oreal.config import HeadBackend
from megatron_oreal.kernels.liger_logprob import LigerCall, LigerOperator, missing_for_liger
from megatron_oreal.parallel.collectives import all_gather_object
from megatron_oreal.parallel.layout import ParallelLayout


def choose_operator(
    backend: HeadBackend, call: LigerCall, *, dtype: torch.dtype, vocab_size: int, layout: ParallelLayout
) -> LigerOperator | None:
    """Returns the operator, or None where our own kernels compute.

    All ranks that have this head call it at the same point. vocab_size: the tokens of the vocabulary, without padding.
    Raises ValueError on all of them where the operator is asked for and one of them cannot have it.
    """
    if backend != "liger":
        return None
    groups = (layout.tensor_group, layout.data_group)
    operator, failure = None, ""
    reason = agreed(
        missing_for_liger(layout.device, dtype, call.num_columns * layout.tensor_size - vocab_size), *groups
    )
    if not reason:
        try:
            operator = LigerOperator(call, layout.tensor_group)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            failure = " ".join(str(error).split()) or type(error).__name__
        reason = agreed(failure, *groups)
    if reason:
        raise ValueError(f"model.head_backend=liger cannot be had: {reason}; set model.head_backend to auto")
    return operator


def agreed(reason: str, *groups: dist.ProcessGroup) -> str:
    """Returns a reason that some rank of the groups has, the same on all their ranks; "" where none has any."""
    for group in groups:
        reason = next(filter(None, all_gather_object(reason, group)), "")
    return reason
