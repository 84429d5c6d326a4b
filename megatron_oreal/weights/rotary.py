"""Reads the rotary positions that a config.json describes; what cannot be carried over is refused by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the tables are read on machines without torch
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """The rope_type "llama3" stretches long wavelengths by `factor`, keeps short ones, and interpolates in between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


def read_rotary(settings: dict[str, Any], family: str) -> tuple[float, Llama3Scaling | None]:
    """Returns theta and the scaling of a config.json. Raises ValueError for a rope type that is not carried over."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or settings.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("model.path: partial_rotary_factor is not supported; only 1.0 is")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "llama3":
        return theta, Llama3Scaling(
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    # "dynamic" differs from "default" only beyond max_position_embeddings, which no run exceeds.
    if rope_type not in ("default", "dynamic"):
        raise ValueError(
            f"model.path: rope type {rope_type!r} is not supported for {family}; known: default, dynamic, llama3"
        )
    return theta, None


def rotary_frequencies(
    theta: float, head_dim: int, scaling: Llama3Scaling | None, device: torch.device | None = None
) -> Tensor:
    """Returns the radians that a position adds, [head_dim / 2] float32."""
    import torch

    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the original context
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return frequencies * kept + frequencies / scaling.factor * (1 - kept)
