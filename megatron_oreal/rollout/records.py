"""Writes each step's samples to a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.observability.files import write_atomically
from megatron_oreal.rollout.metrics import logprob_sum
from megatron_oreal.types import Group, Sample


def write_rollouts(path: Path, groups: Sequence[Group]) -> None:
    """Writes one JSON object for each sample; readers never see an incomplete file.

    The group number distinguishes two groups of the same prompt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path,
        "".join(
            json.dumps({"group": number} | sample_row(group, sample)) + "\n"
            for number, group in enumerate(groups)
            for sample in group.samples
        ),
    )


def sample_row(group: Group, sample: Sample) -> dict[str, object]:
    verdict = sample.verdict
    judged = {"rules": verdict.rules, "judge": verdict.judge} if verdict is not None and verdict.judge else {}
    measured = {} if group.prompt.pass_rate is None else {"prompt_pass_rate": group.prompt.pass_rate}
    return {
        "prompt_id": sample.prompt_id,
        "source": group.prompt.source,
        "prompt": group.prompt.messages[-1].content,
        "answer": group.prompt.answer,
        "response": sample.response_text,
        "status": verdict.status if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "reward": verdict.reward if verdict else None,
        "num_tokens": len(sample.response_ids),
        "logprob": round(logprob_sum(sample), 6) if len(sample.rollout_logprobs) else None,
        "finish_reason": sample.finish_reason,
        "policy_version": sample.policy_version,
        **measured,
        **judged,
    }
