"""Makes servers on a CPU use the seeds of requests. launcher.py loads this file by its path in a server's processes.

SGLang uses seeds only in its deterministic mode, which is for GPUs. This module imports nothing of the package.
"""

from __future__ import annotations

import functools
import importlib
import types
from typing import Any


def murmur_hash(seeds: Any, positions: Any, columns: Any) -> Any:
    """Hashes seed (64 bits), position and column by MurmurHash3 (32 bits): [N], [N], [M] -> [N, M] uint32."""
    import torch

    mask = 0xFFFFFFFF  # products wrap around in int64, and their lower 32 bits are correct

    def rotated(value: Any, count: int) -> Any:
        return ((value << count) | (value >> (32 - count))) & mask

    def mixed(state: Any, block: Any) -> Any:
        block = rotated(((block & mask) * 0xCC9E2D51) & mask, 15)
        return (rotated(state ^ ((block * 0x1B873593) & mask), 13) * 5 + 0xE6546B64) & mask

    seeds = seeds.view(torch.int64)
    state = torch.zeros_like(seeds)
    for block in (seeds, seeds >> 32, positions.long()):
        state = mixed(state, block)
    state = mixed(state[:, None], columns.long()[None]) ^ 16  # the number of mixed bytes
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        state = ((state ^ (state >> shift)) * factor) & mask
    return state.to(torch.uint32)


def honour_seeds() -> None:
    """Makes SGLang use the seeds of requests on a CPU.

    It runs after the stand-ins are installed. On a CPU a response then depends on its seed, and otherwise only on the
    rounding errors that the other requests of its batch cause.
    """
    module = importlib.import_module("sglang.srt.sampling.sampling_batch_info")
    settings = module.__dict__.get("get_exec")
    if settings is None:  # another release: seeds have no effect
        return

    def seeded() -> types.SimpleNamespace:
        deterministic = types.SimpleNamespace(enable_deterministic_inference=True)
        return types.SimpleNamespace(features=settings().features, deterministic=deterministic)

    module.__dict__["get_exec"] = seeded
    draw_in_order_of_ids(importlib.import_module("sglang.srt.layers.sampler"))


def draw_in_order_of_ids(sampler: Any) -> None:
    """Makes a batch with a greedy or truncated request sample like any other: from the probabilities in id order.

    SGLang samples such a batch from sorted probabilities, so a request's random numbers would select other tokens than
    in a batch without such a request.
    """
    name = "top_k_top_p_min_p_sampling_from_probs_torch"
    original = sampler.__dict__.get(name)
    if original is None:  # another release
        return

    @functools.wraps(original)
    def sample(
        probs: Any,  # [N, V], modified in place
        top_ks: Any,  # [N]
        top_ps: Any,  # [N]
        min_ps: Any,  # [N]
        need_min_p_sampling: bool,
        sampling_seed: Any,
        positions: Any,
        **options: Any,
    ) -> Any:
        if sampling_seed is None or options.get("return_filtered_probs"):
            return original(probs, top_ks, top_ps, min_ps, need_min_p_sampling, sampling_seed, positions, **options)
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        # The sum of rounded probabilities may exceed 1, so a request without top_p must keep all tokens.
        dropped = (before > top_ps[:, None]) & (top_ps[:, None] < 1)
        dropped |= order.new_ones(ordered.shape).cumsum(dim=-1) > top_ks[:, None]
        if need_min_p_sampling:
            dropped |= ordered < ordered[:, :1] * min_ps[:, None]
        probs.masked_fill_(dropped.new_zeros(dropped.shape).scatter_(-1, order, dropped), 0.0)
        return sampler.sampling_from_probs_torch(probs, sampling_seed=sampling_seed, positions=positions)

    sampler.__dict__[name] = sample
