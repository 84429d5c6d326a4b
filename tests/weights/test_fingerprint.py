"""A stream is measured on the way: its bytes, and a fingerprint that every bit counts in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_oreal.weights.fingerprint import SMALL_BYTES, MeasuredStream, bit_sums, drain


def digest(weights: list[tuple[str, Tensor]]) -> str:
    measured = MeasuredStream(weights, has_fingerprint=True)
    passed = list(measured)
    assert all(ours is theirs for (_, ours), (_, theirs) in zip(passed, weights, strict=True))
    return measured.fingerprint


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (5, 7), (64, 100), (257, 129)])
def test_one_changed_bit_changes_the_fingerprint(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weights = torch.randn(shape).to(dtype)
    before = digest([("a", weights)])
    octets = weights.view(-1).view(torch.uint8)
    for place in {0, len(octets) // 2, len(octets) - 1}:
        octets[place] ^= 1 << (place % 8)
        assert digest([("a", weights)]) != before
        octets[place] ^= 1 << (place % 8)
    assert digest([("a", weights)]) == before


def test_the_fingerprint_knows_order_names_and_shapes() -> None:
    a, b = torch.randn(4000), torch.randn(4000)
    swapped = a.clone()
    swapped[[10, 3500]] = a[[3500, 10]]
    weights = [("a", a), ("b", b)]
    others = [
        [("a", b), ("b", a)],
        [("a", a), ("c", b)],
        [("a", swapped), ("b", b)],
        [("a", a.view(40, 100)), ("b", b)],
        [("a", a)],
    ]
    assert len({digest(weights), *map(digest, others)}) == 6


def test_the_fingerprint_is_that_of_the_values_however_they_lie_in_memory() -> None:
    """Whole, as a slice of a flat buffer, transposed, and in another order of the stream."""
    a, b = torch.randn(33, 77), torch.randn(1000).bfloat16()
    flat = torch.cat([torch.zeros(1), a.reshape(-1)])
    transposed = a.t().contiguous().t()
    expected = digest([("a", a), ("b", b)])
    assert digest([("a", flat[1:].view(33, 77)), ("b", b)]) == expected
    assert digest([("a", transposed), ("b", b)]) == expected
    assert digest([("b", b), ("a", a)]) == expected


@pytest.mark.parametrize("num_words", [0, 5, 2000, SMALL_BYTES // 8, SMALL_BYTES])
def test_bit_sums_by_hand(num_words: int) -> None:
    """Words 1, 2, 3, ..., and three octets behind them; tensors of both kinds, small and large."""
    words = torch.arange(1, num_words + 1)
    octets = torch.cat([words.view(torch.uint8), torch.tensor([9, 0, 4], dtype=torch.uint8)])
    weighted = sum(n * n for n in range(1, num_words + 1)) + 9 * (num_words + 1) + 4 * (num_words + 3)
    assert bit_sums(octets).tolist() == [num_words * (num_words + 1) // 2 + 13, weighted]
    assert bit_sums(-torch.ones(num_words, dtype=torch.int64)).tolist()[0] == -num_words


def test_the_fingerprint_is_the_one_that_ledgers_on_disk_hold() -> None:
    """Another formula would make every stored response useless: it would belong to no known weights."""
    weights = [("b", torch.arange(3000, dtype=torch.float32)), ("a", torch.tensor([1.5, -2.0]).bfloat16())]
    assert digest(weights) == "e8b8d4d2ead96556cba453d03436d091"


def test_each_pass_is_measured_anew_and_a_part_of_one_counts_as_far_as_it_went() -> None:
    measured = MeasuredStream([("a", torch.zeros(3)), ("b", torch.zeros(2, dtype=torch.bfloat16))])
    for _ in range(2):
        passing = iter(measured)
        assert next(passing)[0] == "a" and measured.num_bytes == 12
        drain(passing)
        assert measured.num_bytes == 16


def test_a_measured_stream_is_not_measured_again() -> None:
    measured = MeasuredStream([("a", torch.ones(3))])
    assert MeasuredStream.of(measured, has_fingerprint=True) is measured
    drain(measured)
    assert measured.fingerprint == digest([("a", torch.ones(3))])


def test_a_stream_without_tensors_has_a_fingerprint_too() -> None:
    empty = MeasuredStream([], has_fingerprint=True)
    drain(empty)
    assert empty.num_bytes == 0 and empty.fingerprint != digest([("a", torch.ones(1))])
