"""What the rollout asks of whatever rewards responses: rules, rules and a judge, or a reward of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_oreal.types import Metrics, Prompt, Verdict


class Verifier(Protocol):
    """Any thread may call any method but `close`."""

    @property
    def num_concurrent(self) -> int:
        """How many groups are worth handing in at the same time."""

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        """Returns a verdict on each whole response to the prompt, in their order.

        It depends on the prompt and these responses alone: not on the load, and not on what was verified before.
        """

    def check(self) -> None:
        """Raises ValueError, one line, where no response could be rewarded. Called before anything is generated."""

    def flush_metrics(self) -> Metrics:
        """Returns what happened since the last call; names begin with time/ where the load plays a part."""

    def close(self) -> None:
        """Frees what the verifier holds; calls under way end with an error."""
