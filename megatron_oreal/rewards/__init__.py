"""Outcome rewards: a rule-based verifier of mathematical answers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_oreal.rewards.math_verifier import MathVerifier

__all__ = ["MathVerifier"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: the verifier's worker processes import modules of this package, and no torch."""
    if name == "MathVerifier":
        from megatron_oreal.rewards.math_verifier import MathVerifier

        return MathVerifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
