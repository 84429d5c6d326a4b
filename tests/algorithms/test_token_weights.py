from math import log

import pytest
import torch
from torch import Tensor

from megatron_oreal.algorithms.oreal import TOKEN_WEIGHTS, token_weights
from megatron_oreal.config import OrealConfig

LN3, LN7, NAN = log(3), log(7), float("nan")


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def weigh(scores: Tensor, mask: Tensor, kind: str, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    config = OrealConfig(token_weights=kind, top_k_ratio=ratio, prefix_mean=False)  # type: ignore[arg-type]
    return TOKEN_WEIGHTS[kind](scores, mask, config)


def test_by_hand() -> None:
    """Prefix means [ln 3, -ln 3, ln 7] and [-ln 7, 0]."""
    mask = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    scores = table([LN3, -3 * LN3, 2 * LN3 + 3 * LN7], [-LN7, LN7, NAN], [NAN] * 3).requires_grad_()
    positive, negative = token_weights(scores, mask)
    torch.testing.assert_close(positive, table([0.5, 0, 0.75], [0, 0, 0], [0, 0, 0]))
    torch.testing.assert_close(negative, table([0, 0.5, 0], [0.75, 0, 0], [0, 0, 0]))
    assert not positive.requires_grad and not negative.requires_grad
    positive, negative = token_weights(scores, mask, prefix_mean=False)
    torch.testing.assert_close(positive, table([0.5, 0, 1 - 2 / (1 + 9 * 343)], [0, 0.75, 0], [0, 0, 0]))
    torch.testing.assert_close(negative, table([0, 13 / 14, 0], [0.75, 0, 0], [0, 0, 0]))


@pytest.mark.parametrize("prefix_mean", [True, False])
def test_outside_the_mask_nothing_is_read(prefix_mean: bool) -> None:
    """Masked-out tokens before, between and after: the weights are those of the masked tokens alone."""
    inside = torch.randn(1, 3, dtype=torch.float64)
    mask = torch.tensor([[False, True, False, True, True, False]])
    for outside in (NAN, float("inf"), -1e30):
        scores = torch.full((1, 6), outside, dtype=torch.float64)
        scores[mask] = inside[0]
        found = token_weights(scores, mask, prefix_mean)
        expected = token_weights(inside, torch.ones(1, 3, dtype=torch.bool), prefix_mean)
        for weights, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(weights[mask], wanted[0])
            assert weights[~mask].eq(0).all()


def test_a_token_speaks_for_one_side_only_and_by_at_most_one() -> None:
    scores = torch.randn(4, 50) * 10
    positive, negative = token_weights(scores, torch.ones(4, 50, dtype=torch.bool), prefix_mean=False)
    assert (positive * negative).eq(0).all()
    torch.testing.assert_close(positive - negative, torch.tanh(scores / 2))
    assert positive.max() <= 1 and negative.max() <= 1


def test_mean_one_by_hand() -> None:
    """[1/2, 0, 3/4] becomes [6/5, 0, 9/5]; where eq. 10 gives nothing, all tokens weigh 1."""
    mask = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    scores = table([LN3, -LN3, LN7, NAN], [-LN7, -LN3, NAN, NAN], [NAN] * 4)
    positive, negative = weigh(scores, mask, "mean_one")
    torch.testing.assert_close(positive, table([1.2, 0, 1.8, 0], [1, 1, 0, 0], [0] * 4))
    torch.testing.assert_close(negative, table([0, 3, 0, 0], [1.2, 0.8, 0, 0], [0] * 4))


def test_top_k_by_hand() -> None:
    """Probabilities [3/4, 7/8, 1/4, 1/2, 1/8]: of 3 kept, normalised among themselves, the last gets 0."""
    mask = torch.tensor([[True] * 5 + [False], [True] * 2 + [False] * 4, [False] * 6])
    scores = table([LN3, LN7, -LN3, 0, -LN7, NAN], [LN3, LN7] + [NAN] * 4, [NAN] * 6)
    positive, negative = weigh(scores, mask, "top_k", ratio=0.6)
    torch.testing.assert_close(positive, table([2 / 3, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6))
    torch.testing.assert_close(negative, table([0, 0, 2 / 3, 0, 1, 0], [1, 0, 0, 0, 0, 0], [0] * 6))
    # A ratio that leaves less than a token keeps one; a single token weighs 1.
    positive, _ = weigh(scores, mask, "top_k", ratio=0.1)
    torch.testing.assert_close(positive, table([0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6))
    positive, _ = weigh(scores, mask, "top_k", ratio=1.0)
    torch.testing.assert_close(positive[0], torch.tensor([5 / 6, 1, 1 / 6, 1 / 2, 0, 0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("threshold", [0.0, 0.0, 0.0, 0.0, 0.0]),
        ("mean_one", [1.0, 1.0, 1.0, 1.0, 0.0]),
        ("top_k", [1.0, 1.0, 0.0, 0.0, 0.0]),  # of equal tokens the first ones
    ],
)
def test_a_zero_head(kind: str, expected: list[float]) -> None:
    mask = torch.tensor([[True, True, True, True, False]])
    for weights in weigh(torch.zeros(1, 5), mask, kind):
        assert weights.tolist() == [expected]
