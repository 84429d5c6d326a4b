"""Checks the rewards of the user's own function or server, and turns them into verdicts.

A reward is a number, or a mapping {"reward": number, "status": word, "extracted": text} whose last two may be missing;
a function may also return a `Verdict`. A sample with any other reward has no verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from megatron_oreal.types import UNJUDGED, Prompt, Verdict, VerdictStatus

MAX_EXTRACTED_CHARACTERS = 1000
STATUSES: tuple[VerdictStatus, ...] = get_args(VerdictStatus)
Json = dict[str, Any]


class RewardError(Exception):
    """Signals that a returned value is not a reward; the message says why."""


@dataclass(slots=True, frozen=True)
class RewardRange:
    """The rewards that are allowed."""

    setting: str  # setting that names the function or the server, for errors
    kind: Literal["binary", "any"] = "binary"
    correct_from: float = 1.0  # the reward from which a sample counts as correct

    def verdict(self, value: Any) -> Verdict:
        """Turns a reward into a verdict. Raises RewardError, and ValueError for a number that is neither 0 nor 1."""
        reward, status, extracted = parts_of(value)
        if status in UNJUDGED:
            return Verdict(0.0, status, extracted)
        if reward is None or not math.isfinite(reward):
            raise RewardError(f"the reward is {reward}, not a finite number")
        with np.errstate(over="ignore"):
            reward = float(np.float32(reward))  # All ranks receive it in float32.
        if not math.isfinite(reward):
            raise RewardError("the reward is too large")
        if self.kind == "binary" and reward not in (0.0, 1.0):
            raise ValueError(
                f"{self.setting}: a reward is {reward:g}, and verifier.rewards=binary allows 0 and 1: return those, or "
                "set verifier.rewards=any with an algorithm that takes any number (algorithm.name=ppo)"
            )
        is_correct = reward >= self.correct_from
        if status is None:
            status = "correct" if is_correct else "incorrect"
        if (status == "correct") != is_correct:
            raise RewardError(f"the status {status!r} does not fit the reward {reward:g}")
        return Verdict(reward, status, extracted)


def parts_of(value: Any) -> tuple[float | None, VerdictStatus | None, str | None]:
    if not isinstance(value, dict):
        return as_float(value), None, None
    unknown = value.keys() - {"reward", "status", "extracted"}
    if unknown or "reward" not in value:
        raise RewardError(f"it has the keys {sorted(map(str, value))}, not reward, status and extracted")
    status, extracted = value.get("status"), value.get("extracted")
    if status is not None and status not in STATUSES:
        raise RewardError(f"the status {str(status)[:40]!r} is not known; known: {', '.join(STATUSES)}")
    if extracted is not None and not isinstance(extracted, str):
        raise RewardError(f"extracted is of type {type(extracted).__name__}, not a text")
    return as_float(value["reward"]), status, extracted[:MAX_EXTRACTED_CHARACTERS] if extracted is not None else None


def as_float(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)):
        raise RewardError(f"it is of type {type(value).__name__}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise RewardError("the reward is too large") from None


def request_of(prompt: Prompt, response: str) -> Json:
    """Returns a prompt and a response as JSON, for a worker process or a server."""
    return {
        "prompt": {
            "id": prompt.id,
            "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "answer": prompt.answer,
            "pass_rate": prompt.pass_rate,
            "source": prompt.source,
            "metadata": dict(prompt.metadata),
        },
        "response": response,
    }
