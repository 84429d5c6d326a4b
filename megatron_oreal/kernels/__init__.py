"""Provides kernels. `linear_logprob` computes log-probs from hidden states without holding logits [T, V] in memory."""

from megatron_oreal.kernels.linear_logprob import linear_logprob

__all__ = ["linear_logprob"]
