"""Gets rewards from the user's own HTTP server, `verifier.url`.

    POST URL   {"requests": [{"prompt": {"id", "messages", "answer", "pass_rate", "source", "metadata"}, "response"}]}
    200        {"rewards": [1, 0.5, {"reward": 0, "status": "no_answer", "extracted": null}]}   in the same order

If a batch's request fails after all retries, or its answer is not such JSON, all its samples are "reward_failed". A
single invalid reward makes its sample "reward_failed". The run counts these samples and does not train on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from megatron_oreal.config import RemoteRewardConfig
from megatron_oreal.observability.closing import Closing
from megatron_oreal.rewards.failures import FailureNotes
from megatron_oreal.rewards.json_client import JsonClient, RequestError
from megatron_oreal.rewards.own_rewards import RewardError, RewardRange, request_of
from megatron_oreal.types import Message, Metrics, Notify, Prompt, Verdict

FAILED = Verdict(0.0, "reward_failed", None)


class RemoteVerifier(Closing):
    def __init__(self, url: str, config: RemoteRewardConfig, rewards: RewardRange, notify: Notify) -> None:
        """Raises ValueError for a missing API key."""
        self.config, self.rewards = config, rewards
        self.client = JsonClient(url, config, "verifier.remote")
        self.failures = FailureNotes("verifier.url gave no reward for", notify)

    @property
    def num_concurrent(self) -> int:
        return self.config.max_concurrent_requests

    def check(self) -> None:
        """Sends an invented prompt, whose reward is ignored. Raises ValueError if the server does not answer."""
        prompt = Prompt("check", (Message("user", "What is 1 + 1?"),), "2", source="check")
        try:
            self.client.run(self._ask([request_of(prompt, r"The answer is \boxed{2}.")]))
        except RequestError as error:
            raise ValueError(f"verifier.url: {self.client.address} does not answer as it should: {error}") from None

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        requests = [request_of(prompt, response) for response in responses]
        size = self.config.batch_size
        batches = [requests[start : start + size] for start in range(0, len(requests), size)]
        values = self.client.run(self._ask_all(batches)) if batches else []
        return [self._verdict(value) for value in values]

    def flush_metrics(self) -> Metrics:
        return self.client.flush_metrics("time/remote")

    def close(self) -> None:
        self.client.close()

    def _verdict(self, value: Any) -> Verdict:
        if value is FAILED:
            return FAILED
        try:
            return self.rewards.verdict(value)
        except RewardError as error:
            self.failures.add(str(error))
            return FAILED

    async def _ask_all(self, batches: Sequence[list[Any]]) -> list[Any]:
        answers = await asyncio.gather(*map(self._ask_or_fail, batches))
        return [value for answer in answers for value in answer]

    async def _ask_or_fail(self, requests: list[Any]) -> list[Any]:
        try:
            return await self._ask(requests)
        except RequestError as error:
            self.client.counts["failed"] += 1
            self.failures.add(str(error), len(requests))
            return [FAILED] * len(requests)

    async def _ask(self, requests: list[Any]) -> list[Any]:
        answer = await self.client.post({"requests": requests})
        values = answer.get("rewards") if isinstance(answer, dict) else None
        if not isinstance(values, list) or len(values) != len(requests):
            raise RequestError(f"the answer's JSON has no list of {len(requests)} rewards")
        return values
