"""Kernels. `linear_logprob` turns hidden states into log-probs without ever holding [T, V]."""

from megatron_oreal.kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
