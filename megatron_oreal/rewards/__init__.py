"""Outcome rewards: a rule-based verifier of mathematical answers."""

from megatron_oreal.rewards.math_verifier import MathVerifier

__all__ = ["MathVerifier"]
