"""The check that decides whether torch's variable-length attention is used."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_oreal.models.attention import causal_batch, difference_from_padded


def by_segment(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    borders = cu_seqlens.tolist()
    return torch.cat(
        [causal_batch(query[a:b][None], key[a:b][None], value[a:b][None], scale)[0] for a, b in pairwise(borders)]
    )


def whole(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    return causal_batch(query[None], key[None], value[None], scale)[0]


def wrong_gradient(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    return by_segment(query, key.detach() + 0.5 * (key - key.detach()), value, cu_seqlens, longest, scale)


def refusing(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float) -> Tensor:
    raise ValueError("heads differ")


def test_what_agrees_is_taken() -> None:
    assert difference_from_padded(by_segment, "cpu") == ""


@pytest.mark.parametrize(
    ("attend", "problem"),
    [
        (whole, "the output differs"),
        (wrong_gradient, "the gradient of its key differs"),
        (refusing, "it raises ValueError: heads differ"),
    ],
)
def test_what_differs_is_named(attend: object, problem: str) -> None:
    assert problem in difference_from_padded(attend, "cpu")  # type: ignore[arg-type]
