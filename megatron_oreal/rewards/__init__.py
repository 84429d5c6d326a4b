"""Provides outcome rewards: a rule-based verifier of mathematical answers, a judge, and rewards of the user's own."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_oreal.rewards.math_verifier import MathVerifier

__all__ = ["MathVerifier"]


def __getattr__(name: str) -> Any:
    """Imports the verifier on first access, because its worker processes import this package without torch."""
    if name == "MathVerifier":
        from megatron_oreal.rewards.math_verifier import MathVerifier

        return MathVerifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
