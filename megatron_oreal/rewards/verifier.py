"""Defines the interface by which the rollout gets rewards: from rules, rules and a judge, or the user's own reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_oreal.types import Metrics, Prompt, Verdict


class Verifier(Protocol):
    """Rewards responses. Any thread may call any method except `close`."""

    @property
    def num_concurrent(self) -> int:
        """Returns how many groups the rollout should submit at the same time."""

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        """Returns a verdict on each whole response to the prompt, in the given order.

        The verdicts depend only on the prompt and these responses, not on the load or on earlier calls.
        """

    def check(self) -> None:
        """Raises a one-line ValueError if no response could be rewarded. The run calls it before generation begins."""

    def flush_metrics(self) -> Metrics:
        """Returns metrics since the last call; the names of those that depend on the load begin with time/."""

    def close(self) -> None:
        """Frees the verifier's resources; running calls end with an error."""
