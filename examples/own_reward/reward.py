"""Ten-line rewards: `verifier.function: reward:closeness` and `verifier.function: reward:short_and_right`."""

from __future__ import annotations

import re

from megatron_oreal.types import Prompt, Verdict


def closeness(prompt: Prompt, response: str) -> float:
    """1 for the reference answer, less the further the last number of the response is away from it."""
    numbers = re.findall(r"-?\d+", response)
    if not numbers:
        return 0.0
    return 1.0 / (1.0 + abs(int(numbers[-1][:9]) - int(prompt.answer)))


async def short_and_right(prompt: Prompt, response: str) -> Verdict:
    """1 for the reference answer in a box, in at most `limit` characters of the prompt's own metadata."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", response)
    if not boxes:
        return Verdict(0.0, "no_answer", None)
    is_right = boxes[-1] == prompt.answer and len(response) <= prompt.metadata.get("limit", 200)
    return Verdict(float(is_right), "correct" if is_right else "incorrect", boxes[-1])
