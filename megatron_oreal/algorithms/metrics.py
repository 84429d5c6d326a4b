"""Puts the metrics of a step's optimizer steps together."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oreal.types import Metrics


def over_updates(updates: Sequence[Metrics]) -> Metrics:
    """Returns one step's metrics of a model, of those of each of its optimizer steps; all have the same names.

    A metric is the mean over the optimizer steps. A name in _max is the largest, and a learning rate is the last one's.

    Example: `over_updates([{"policy/kl": 1.0}, {"policy/kl": 2.0}])` is `{"policy/kl": 1.5}`.
    """
    return {name: combined(name, [update[name] for update in updates]) for name in updates[0]} if updates else {}


def combined(name: str, values: Sequence[float]) -> float:
    if name.endswith("_max"):
        return max(values)
    return values[-1] if name.endswith("/lr") else sum(values) / len(values)
