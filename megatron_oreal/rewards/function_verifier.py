"""Calls the user's reward function, `verifier.function`, in worker processes that can be killed.

A call that uses up `verifier.cpu_seconds` has the status "timeout", one whose process ends twice "crash", and one that
raises an error or returns no finite number "reward_failed". The run counts all three and does not train on them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_oreal.observability.closing import Closing
from megatron_oreal.rewards.failures import FailureNotes
from megatron_oreal.rewards.own_rewards import RewardError, RewardRange, request_of
from megatron_oreal.rewards.process_pool import NUM_ATTEMPTS, ProcessPool
from megatron_oreal.rewards.worker_pool import WorkerProcess, default_wall_seconds
from megatron_oreal.types import Metrics, Notify, Prompt, Verdict, VerdictStatus

Request = dict[str, Any]


class FunctionProcess(WorkerProcess):
    """A process that has imported the function. Raises ValueError if the import fails."""

    def call(self, request: Request) -> Request:
        """Returns the worker's reply; if the process has ended, {"status": "timeout"} or {"status": "crash"}."""
        if not self.send(request):
            return {"status": "crash"}
        line = self.read_line(self.wall_seconds)
        if line is not None:
            reply: Request = json.loads(line)
            return reply
        return {"status": "timeout" if self.end_in_time() or self.spent_its_budget else "crash"}


class FunctionPool(ProcessPool["Request | None", Request, FunctionProcess]):
    """Calls the function in up to `num_workers` processes. The job None only ensures that a process runs."""

    def __init__(self, function: str, num_workers: int, cpu_seconds: float, memory_bytes: int) -> None:
        super().__init__(num_workers)
        self.function, self.cpu_seconds, self.memory_bytes = function, cpu_seconds, memory_bytes

    def start_process(self) -> FunctionProcess:
        wall_seconds = default_wall_seconds(self.cpu_seconds)
        return FunctionProcess(self.cpu_seconds, wall_seconds, self.memory_bytes, self.function)

    def answer(self, index: int, job: Request | None) -> Request:
        reply: Request = {"status": "crash"}
        for _ in range(NUM_ATTEMPTS):
            if self.is_closed:
                raise RuntimeError("the verifier was closed during a call of verifier.function")
            worker = self.running_worker(index)
            if job is None:
                return {}
            reply = worker.call(job)
            if reply.get("status") != "crash":
                break
        return reply


class FunctionVerifier(Closing):
    def __init__(
        self,
        function: str,
        num_workers: int,
        cpu_seconds: float,
        memory_bytes: int,
        rewards: RewardRange,
        notify: Notify,
    ) -> None:
        self.pool = FunctionPool(function, num_workers, cpu_seconds, memory_bytes)
        self.rewards = rewards
        self.failures = FailureNotes(f"verifier.function: {function} gave no reward for", notify)

    @property
    def num_concurrent(self) -> int:
        return max(4, self.pool.num_workers)

    def check(self) -> None:
        """Imports the function. Raises a one-line ValueError if that is impossible."""
        self.pool.submit_many([None])[0].result()

    def verify_responses(self, prompt: Prompt, responses: Sequence[str]) -> list[Verdict]:
        futures = self.pool.submit_many([request_of(prompt, response) for response in responses])
        return [self._verdict(future.result(), prompt) for future in futures]

    def flush_metrics(self) -> Metrics:
        return {}

    def close(self) -> None:
        self.pool.close()

    def _verdict(self, reply: Request, prompt: Prompt) -> Verdict:
        status: VerdictStatus = reply.get("status", "reward_failed")
        try:
            if "reward" in reply:
                return self.rewards.verdict(reply["reward"])
            message = str(reply.get("error", status))
        except RewardError as error:
            message = str(error)
        self.failures.add(f"{message} (prompt {prompt.id!r})")
        return Verdict(0.0, status, None)
