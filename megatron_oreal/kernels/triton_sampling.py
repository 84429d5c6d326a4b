"""Samples one token a row on a GPU, without sorting the vocabulary: temperature, top-k, top-p and the inverse CDF.

The definition is `draw_with` of engines/local/token_sampling.py. Here each row is one program, which reads its logits
several times and writes three numbers. Probabilities are integers in units of 2^-44 of the most likely token's, so
their sums are exact and the same in any order.

A truncated distribution is described by two numbers: the logit of its least likely token, and how many tokens of
exactly this logit, in the order of their ids, belong to it. The logit is the largest one whose upper set, all tokens
that are at least as likely, still has the wanted count (top-k) or mass (top-p). It is found digit by digit in the
floats' bits, whose order as integers is that of the floats: two bits in the first pass over the row, three in each of
ten more.

Import this module only if Triton is installed. With TRITON_INTERPRET=1, set before the import, it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns at a time
NUM_WARPS = 8
UNIT: tl.constexpr = tl.constexpr(2.0**44)  # of the most likely token: the sum over 2^18 tokens fits 63 bits
LOWEST_KEY: tl.constexpr = tl.constexpr(-(2**31))
MASS_ONE = 2**30  # of top_p, as an integer


@triton.jit
def keys_of(values: tl.tensor) -> tl.tensor:
    """Maps floats to int32 of the same order; both zeros map to the same number."""
    values = tl.where(values == 0.0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def masses_of(values: tl.tensor, maximum: tl.tensor, inverse_temperature: float) -> tl.tensor:
    """Returns int64 probabilities in units of 2^-44 of the largest one."""
    return (tl.exp((values - maximum) * inverse_temperature) * UNIT).to(tl.int64)


@triton.jit
def measures_of(
    values: tl.tensor,
    keys: tl.tensor,
    inside: tl.tensor,
    maximum: tl.tensor,
    inverse_temperature: float,
    lowest: tl.tensor,
    COUNTS: tl.constexpr,
) -> tl.tensor:
    """Returns what a token adds to its upper sets: 1, or its probability if it is above the key `lowest`."""
    if COUNTS:
        return inside.to(tl.int64)
    return tl.where(inside & (keys > lowest), masses_of(values, maximum, inverse_temperature), 0)


@triton.jit
def find_key(
    logits: tl.tensor,
    vocab_size: int,
    maximum: tl.tensor,
    inverse_temperature: float,
    needed: tl.tensor,  # the measure that the upper set must have
    lowest: tl.tensor,  # key: the measure of all tokens at it is `at_lowest`, and those below have none
    at_lowest: tl.tensor,
    COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns the largest key such that the keys from it on have a measure of at least `needed`."""
    found = LOWEST_KEY
    found = found.to(tl.int32)
    first = tl.zeros((BLOCK,), tl.int64)
    second = tl.zeros((BLOCK,), tl.int64)
    third = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        values = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        keys = keys_of(values)
        measures = measures_of(values, keys, inside, maximum, inverse_temperature, lowest, COUNTS)
        first += tl.where(keys >= -1073741824, measures, 0)
        second += tl.where(keys >= 0, measures, 0)
        third += tl.where(keys >= 1073741824, measures, 0)
    digit = (tl.sum(first, axis=0) + tl.where(lowest >= -1073741824, at_lowest, 0) >= needed).to(tl.int32)
    digit += (tl.sum(second, axis=0) + tl.where(lowest >= 0, at_lowest, 0) >= needed).to(tl.int32)
    digit += (tl.sum(third, axis=0) + tl.where(lowest >= 1073741824, at_lowest, 0) >= needed).to(tl.int32)
    found += digit << 30
    for step in range(10):
        unit = 1 << (27 - 3 * step)
        sum1 = tl.zeros((BLOCK,), tl.int64)
        sum2 = tl.zeros((BLOCK,), tl.int64)
        sum3 = tl.zeros((BLOCK,), tl.int64)
        sum4 = tl.zeros((BLOCK,), tl.int64)
        sum5 = tl.zeros((BLOCK,), tl.int64)
        sum6 = tl.zeros((BLOCK,), tl.int64)
        sum7 = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, vocab_size, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab_size
            values = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
            keys = keys_of(values)
            measures = measures_of(values, keys, inside, maximum, inverse_temperature, lowest, COUNTS)
            sum1 += tl.where(keys >= found + unit, measures, 0)
            sum2 += tl.where(keys >= found + 2 * unit, measures, 0)
            sum3 += tl.where(keys >= found + 3 * unit, measures, 0)
            sum4 += tl.where(keys >= found + 4 * unit, measures, 0)
            sum5 += tl.where(keys >= found + 5 * unit, measures, 0)
            sum6 += tl.where(keys >= found + 6 * unit, measures, 0)
            sum7 += tl.where(keys >= found + 7 * unit, measures, 0)
        digit = (tl.sum(sum1, axis=0) + tl.where(lowest >= found + unit, at_lowest, 0) >= needed).to(tl.int32)
        digit += (tl.sum(sum2, axis=0) + tl.where(lowest >= found + 2 * unit, at_lowest, 0) >= needed).to(tl.int32)
        digit += (tl.sum(sum3, axis=0) + tl.where(lowest >= found + 3 * unit, at_lowest, 0) >= needed).to(tl.int32)
        digit += (tl.sum(sum4, axis=0) + tl.where(lowest >= found + 4 * unit, at_lowest, 0) >= needed).to(tl.int32)
        digit += (tl.sum(sum5, axis=0) + tl.where(lowest >= found + 5 * unit, at_lowest, 0) >= needed).to(tl.int32)
        digit += (tl.sum(sum6, axis=0) + tl.where(lowest >= found + 6 * unit, at_lowest, 0) >= needed).to(tl.int32)
        digit += (tl.sum(sum7, axis=0) + tl.where(lowest >= found + 7 * unit, at_lowest, 0) >= needed).to(tl.int32)
        found += digit * unit
    return found


@triton.jit
def measure_at(
    logits: tl.tensor,
    vocab_size: int,
    maximum: tl.tensor,
    inverse_temperature: float,
    key: tl.tensor,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns (tokens above the key, their mass, tokens at it, their mass), int64."""
    count_above = tl.zeros((BLOCK,), tl.int64)
    mass_above = tl.zeros((BLOCK,), tl.int64)
    count_at = tl.zeros((BLOCK,), tl.int64)
    mass_at = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        values = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        keys = keys_of(values)
        masses = masses_of(values, maximum, inverse_temperature)
        is_above = inside & (keys > key)
        is_at = inside & (keys == key)
        count_above += is_above.to(tl.int64)
        mass_above += tl.where(is_above, masses, 0)
        count_at += is_at.to(tl.int64)
        mass_at += tl.where(is_at, masses, 0)
    return tl.sum(count_above, axis=0), tl.sum(mass_above, axis=0), tl.sum(count_at, axis=0), tl.sum(mass_at, axis=0)


@triton.jit
def logsumexp_of(logits: tl.tensor, vocab_size: int, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Returns (logsumexp, maximum) of the row."""
    # Finite, so that an empty sum times its factor is 0, not NaN. The maximum can skip a NaN, but the sums keep it.
    maximum = -3.0e38
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values = tl.load(logits + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(maximum, tl.max(values, axis=0))
        sums = sums * tl.exp(maximum - higher) + tl.exp(values - higher)
        maximum = higher
    return maximum + tl.log(tl.sum(sums, axis=0)), maximum


@triton.jit
def token_at(
    logits: tl.tensor,
    vocab_size: int,
    maximum: tl.tensor,
    inverse_temperature: float,
    key: tl.tensor,
    num_at_key: tl.tensor,
    target: tl.tensor,
    TRUNCATES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Returns the first token at which the kept tokens' mass, summed in the order of ids, exceeds `target`."""
    token = 0
    before = tl.zeros((), tl.int64)
    num_seen = tl.zeros((), tl.int64)  # tokens at the key
    start = 0
    while (start < vocab_size) & (before <= target):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab_size
        values = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        keys = keys_of(values)
        is_kept = inside & (keys > key)
        if TRUNCATES:
            is_at = (inside & (keys == key)).to(tl.int64)
            is_kept = is_kept | ((is_at > 0) & (num_seen + tl.cumsum(is_at, axis=0) <= num_at_key))
            num_seen += tl.sum(is_at, axis=0)
        masses = tl.where(is_kept, masses_of(values, maximum, inverse_temperature), 0)
        token = start + tl.sum((before + tl.cumsum(masses, axis=0) <= target).to(tl.int32), axis=0)
        before += tl.sum(masses, axis=0)
        start += BLOCK
    return tl.minimum(token, vocab_size - 1)


# Triton treats an integer argument of 1 as a constant, which has no type to convert.
@triton.jit(do_not_specialize=["top_k", "top_p"])
def sample_kernel(
    logits: tl.tensor,  # [N, vocab_size], any float type
    row_stride: int,
    uniform: tl.tensor,  # [N] float64 in [0, 1)
    token_ids: tl.tensor,  # [N] int64
    rollout_logprobs: tl.tensor,  # [N] float32
    model_logprobs: tl.tensor,  # [N] float32
    vocab_size: int,
    inverse_temperature: float,
    top_k: tl.tensor,
    top_p: tl.tensor,  # in units of 2^-30
    HAS_TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr,
    IS_MODEL: tl.constexpr,  # the distribution is the model's own
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    logsumexp, maximum = logsumexp_of(logits, vocab_size, BLOCK)
    # The kernel keeps all tokens above `key`, and the first `num_at_key` tokens at `key`.
    key = LOWEST_KEY
    key = key.to(tl.int32)
    num_at_key = tl.zeros((), tl.int64)
    one_at_key = tl.zeros((), tl.int64)  # mass of a token at the key
    if HAS_TOP_K:
        key = find_key(
            logits, vocab_size, maximum, inverse_temperature, top_k.to(tl.int64), key, num_at_key, True, BLOCK
        )
    count_above, mass_above, count_at, mass_at = measure_at(
        logits, vocab_size, maximum, inverse_temperature, key, BLOCK
    )
    if HAS_TOP_K:
        num_at_key = top_k - count_above
        one_at_key = mass_at // tl.maximum(count_at, 1)
    total = mass_above + num_at_key * one_at_key
    if HAS_TOP_P:
        share = top_p.to(tl.float64) / 1073741824.0
        exact = total.to(tl.float64) * share
        # A token is kept if the mass before it is less than the share; the most likely token is always kept.
        needed = exact.to(tl.int64)
        needed += (needed.to(tl.float64) < exact).to(tl.int64)
        needed = tl.maximum(tl.minimum(needed, total), 1)
        at_lowest = num_at_key * one_at_key
        key = find_key(logits, vocab_size, maximum, inverse_temperature, needed, key, at_lowest, False, BLOCK)
        count_above, mass_above, count_at, mass_at = measure_at(
            logits, vocab_size, maximum, inverse_temperature, key, BLOCK
        )
        one_at_key = mass_at // tl.maximum(count_at, 1)
        num_at_key = (needed - mass_above + one_at_key - 1) // tl.maximum(one_at_key, 1)
        total = mass_above + num_at_key * one_at_key

    target = tl.minimum((tl.load(uniform + row) * total.to(tl.float64)).to(tl.int64), total - 1)
    token = token_at(
        logits, vocab_size, maximum, inverse_temperature, key, num_at_key, target, HAS_TOP_K or HAS_TOP_P, BLOCK
    )
    chosen = tl.load(logits + token).to(tl.float32)
    model_logprob = chosen - logsumexp
    tl.store(token_ids + row, token.to(tl.int64))
    tl.store(model_logprobs + row, model_logprob)
    if IS_MODEL:
        tl.store(rollout_logprobs + row, model_logprob)
    else:
        mass = (total.to(tl.float64) / UNIT).to(tl.float32)
        # This also detects a log-prob of the model that is not finite.
        rollout_logprob = (chosen - maximum) * inverse_temperature - tl.log(mass)
        tl.store(rollout_logprobs + row, tl.where(model_logprob == model_logprob, rollout_logprob, model_logprob))


def sample_rows(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (token_ids [N] int64, rollout_logprobs [N] float32, model_logprobs [N] float32) for logits [N, V].

    uniform: [N] float64 in [0, 1). temperature > 0; top_k 0 and top_p 1 keep every token. Rows whose logits are not
    finite get a token of the vocabulary and log-probs that are not finite.
    """
    num_rows, vocab_size = logits.shape
    assert temperature > 0 and vocab_size <= 2**18 and logits.stride(1) == 1
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(2, num_rows, dtype=torch.float32, device=logits.device)
    has_top_k, has_top_p = 0 < top_k < vocab_size, top_p < 1
    sample_kernel[(num_rows,)](
        logits,
        logits.stride(0),
        uniform,
        token_ids,
        logprobs[0],
        logprobs[1],
        vocab_size,
        1.0 / temperature,
        top_k,
        round(top_p * MASS_ONE),
        HAS_TOP_K=has_top_k,
        HAS_TOP_P=has_top_p,
        IS_MODEL=temperature == 1 and not has_top_k and not has_top_p,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return token_ids, logprobs[0], logprobs[1]
