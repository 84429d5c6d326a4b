"""Chooses what computes a head's log-probs: our own kernels, or Liger's operator (model.head_backend)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_oreal.config import HeadBackend
from megatron_oreal.kernels.liger_logprob import LigerCall, LigerOperator, missing_for_liger
from megatron_oreal.parallel.collectives import all_gather_object
from megatron_oreal.parallel.layout import ParallelLayout


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """What a head computes with."""

    operator: LigerOperator | None = None
    reason: str = ""  # why our own kernels compute where `auto` could have taken the operator

    @property
    def words(self) -> str:
        """For the line that says what runs on this device."""
        if self.operator is not None:
            return "log-probs by Liger's operator"
        return f"log-probs by our own kernels ({self.reason})" if self.reason else ""


def choose_backend(
    backend: HeadBackend, call: LigerCall, *, dtype: torch.dtype, vocab_size: int, layout: ParallelLayout
) -> BackendChoice:
    """Returns the same choice on all ranks that have this head, which all call it at the same point.

    vocab_size: the tokens of the tokenizer's vocabulary, without padding. Raises ValueError where the setting is
    `liger` and the operator cannot be had.
    """
    if backend == "own" or (backend == "auto" and layout.device.type == "cpu"):
        return BackendChoice()
    groups = (layout.tensor_group, layout.data_group)
    missing = missing_for_liger(layout.device, dtype, call.num_columns * layout.tensor_size - vocab_size)
    if not missing and backend == "auto" and layout.deterministic_updates:
        missing = "its gradients are not promised to be the same bits twice, and updates are deterministic"
    operator: LigerOperator | None = None
    reason = agreed(missing, *groups)
    if not reason:
        failure = ""
        try:
            operator = LigerOperator(call, layout.tensor_group)
        except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
            failure = " ".join(str(error).split()) or type(error).__name__
        reason = agreed(failure, *groups)
    if reason and backend == "liger":
        raise ValueError(f"model.head_backend=liger cannot be had: {reason}; set model.head_backend to auto or own")
    return BackendChoice(None if reason else operator, reason)


def agreed(reason: str, *groups: dist.ProcessGroup) -> str:
    """Returns a reason that some rank of the groups has, the same on all their ranks; "" where none has any."""
    for group in groups:
        reason = next(filter(None, all_gather_object(reason, group)), "")
    return reason
