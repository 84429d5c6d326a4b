"""Puts the metrics of a step's mini-batches together."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.types import Metrics


def over_minibatches(updates: Sequence[Metrics]) -> Metrics:
    """Returns the metrics of one pass over a step's samples, of those of its mini-batches; all have the same names.

    A metric is the mean over the mini-batches. A name in _max is the largest, and a learning rate is the last one's.

    Example: `over_minibatches([{"policy/kl": 1.0}, {"policy/kl": 2.0}])` is `{"policy/kl": 1.5}`.
    """
    return {name: combined(name, [update[name] for update in updates]) for name in updates[0]} if updates else {}


def combined(name: str, values: Sequence[float]) -> float:
    if name.endswith("_max"):
        return max(values)
    return values[-1] if name.endswith("/lr") else sum(values) / len(values)
