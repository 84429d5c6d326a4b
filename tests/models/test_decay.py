"""Learning rates after the warm-up, and the initial weights of scalar heads, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_oreal.config import OptimizerConfig
from megatron_oreal.models.heads import HEAD_INITS
from megatron_oreal.models.optimizer import build_schedule


def learning_rates(num_updates: int, **settings: Any) -> list[float]:
    """What each update is taken with; the schedule moves before it."""
    optimizer: Any = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, OptimizerConfig(lr=1.0, **settings), num_updates)
    rates = []
    for _ in range(num_updates):
        schedule.step(1)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def test_linear_decay_ends_with_the_run() -> None:
    assert learning_rates(4, decay="linear", min_lr=0.2) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert learning_rates(6, decay="linear", warmup_steps=2) == pytest.approx([0.5, 1.0, 0.75, 0.5, 0.25, 0.0])


def test_linear_decay_ends_where_it_is_told_to() -> None:
    assert learning_rates(4, decay="linear", min_lr=0.5, decay_steps=2) == pytest.approx([0.75, 0.5, 0.5, 0.5])


def test_cosine_and_constant() -> None:
    assert learning_rates(2, decay="cosine") == pytest.approx([0.5, 0.0])
    assert learning_rates(3, warmup_steps=2) == pytest.approx([0.5, 1.0, 1.0])


def test_a_linear_layer_of_torch_has_the_same_bound() -> None:
    """torch.nn.Linear draws from kaiming_uniform_(a = sqrt 5) too: U(-1 / sqrt H, 1 / sqrt H)."""
    hidden = 4096
    weight = HEAD_INITS["kaiming_uniform"](torch.zeros(1, hidden), torch.Generator().manual_seed(1))
    bound = 1 / math.sqrt(hidden)
    assert 0.99 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    layer = torch.nn.Linear(hidden, 1, bias=False).weight
    assert layer.abs().max().item() <= bound
    values = weight @ torch.randn(hidden, 1000, generator=torch.Generator().manual_seed(2))
    assert values.std().item() == pytest.approx(1 / math.sqrt(3), rel=0.1)  # of normalised hidden states
