"""Combines the metrics of a step's mini-batches."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.types import Metrics


def over_minibatches(updates: Sequence[Metrics]) -> Metrics:
    """Combines the metrics of the mini-batches of one pass over a step's samples; all mini-batches have the same names.

    A metric becomes the mean over the mini-batches. A metric whose name ends in _max becomes the largest value, and a
    learning rate is the one of the last mini-batch.

    Example: `over_minibatches([{"policy/kl": 1.0}, {"policy/kl": 2.0}])` is `{"policy/kl": 1.5}`.
    """
    return {name: combined(name, [update[name] for update in updates]) for name in updates[0]} if updates else {}


def combined(name: str, values: Sequence[float]) -> float:
    if name.endswith("_max"):
        return max(values)
    return values[-1] if name.endswith("/lr") else sum(values) / len(values)
