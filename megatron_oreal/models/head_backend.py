"""Chooses the implementation of a head's log-probs: our own kernels, or Liger's operator (model.head_backend).

`auto` selects our own: on an H200 they were faster than the operator at every measured shape, forward and backward, and
more exact (tools/bench/results/2026-11-28_h200.md).
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
    """Returns the operator, or None if our own kernels compute the log-probs.

    All ranks that have this head call it at the same point. vocab_size: the number of tokens of the vocabulary, without
    padding. Raises ValueError on all of them if the operator is requested and one of them cannot use it.
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
    """Collective. Returns one rank's reason, the same on all ranks of the groups; "" if no rank has one."""
    for group in groups:
        reason = next(filter(None, all_gather_object(reason, group)), "")
    return reason
