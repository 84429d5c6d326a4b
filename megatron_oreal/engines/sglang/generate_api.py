"""What is asked of a server's /generate, and what its answer says: token ids both ways, never text.

Measured with SGLang 0.5.23: log-probs are of the untempered, untruncated model where the server runs with
SGLANG_RETURN_ORIGINAL_LOGPROB=1, as ours do. With both `top_k` and `top_p`, its `top_p` counts the mass of all tokens.
`sampling_seed` counts with --enable-deterministic-inference only; a token's random numbers depend on the seed and on
its place in the whole sequence, so a response that is continued with the same seed is the unbroken one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from typing import Any

from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams
from megatron_oreal.engines.local.token_sampling import as_int64
from megatron_oreal.engines.sglang.client import ServerError, ServerRefusal
from megatron_oreal.types import FinishReason

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.25, 8.0
BUSY_STATUSES = (408, 429)  # of a server that only has too much to do
UNSTAMPED = "default"  # what a server calls the weights that it has read from disk


class MalformedAnswer(ServerError):
    """The server's answer is not what this package knows: asking again is no use."""


@dataclass(slots=True, frozen=True)
class Answer:
    """What one request added to a response."""

    token_ids: list[int]
    model_logprobs: list[float]
    policy_versions: list[int]
    finish_reason: FinishReason


@dataclass(slots=True)
class Response:
    """A response under way: what `begun` and the answers so far have given."""

    request: GenerationRequest
    params: SamplingParams
    token_ids: list[int] = field(default_factory=list)
    rollout_logprobs: list[float] | None = field(default_factory=list)  # None: not known
    model_logprobs: list[float] = field(default_factory=list)
    policy_versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: GenerationRequest, params: SamplingParams) -> Response:
        begun = request.begun
        if begun is None:
            return cls(request, params)
        is_known = len(begun.rollout_logprobs) == len(begun.response_ids)
        return cls(
            request,
            params,
            list(begun.response_ids),
            list(begun.rollout_logprobs) if is_known else None,
            list(begun.model_logprobs),
            list(begun.policy_versions),
        )

    @property
    def num_missing(self) -> int:
        """Tokens that may still come."""
        return 0 if self.has_stopped else max(0, self.params.max_new_tokens - len(self.token_ids))

    @property
    def has_stopped(self) -> bool:
        return bool(self.token_ids) and self.token_ids[-1] in self.params.stop_token_ids

    def body(self, request_id: str) -> dict[str, Any]:
        """Asks for what is missing."""
        params = self.params
        return {
            "rid": request_id,
            "input_ids": [*self.request.prompt_ids, *self.token_ids],
            "sampling_params": {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k or -1,
                "max_new_tokens": self.num_missing,
                "stop_token_ids": list(params.stop_token_ids),
                "ignore_eos": not params.stop_token_ids,  # true would ignore stop_token_ids too
                "sampling_seed": as_int64(self.request.seed),
            },
            "return_logprob": True,
        }

    def add(self, answer: Answer) -> None:
        self.token_ids += answer.token_ids
        self.model_logprobs += answer.model_logprobs
        self.policy_versions += answer.policy_versions
        if self.params.temperature == 0:
            added: list[float] | None = [0.0] * len(answer.token_ids)
        elif self.params.temperature == 1 and self.params.top_p == 1 and self.params.top_k == 0:
            added = answer.model_logprobs
        else:
            added = None if answer.token_ids else []
        known = self.rollout_logprobs
        self.rollout_logprobs = None if known is None or added is None else known + added

    def generation(self) -> Generation:
        """Aborted where tokens are missing."""
        finish_reason: FinishReason = "stop" if self.has_stopped else "abort" if self.num_missing else "length"
        return Generation(
            self.token_ids, self.rollout_logprobs or [], self.model_logprobs, finish_reason, self.policy_versions
        )


def read_answer(answer: Any, num_asked: int, server: object) -> Answer:
    """Raises MalformedAnswer naming the server, and FloatingPointError for log-probs that are not finite.

    num_asked: the tokens asked for, which a response of finish reason "length" must have.
    """
    try:
        token_ids = answer["output_ids"]
        meta = answer["meta_info"]
        finish_reason = meta["finish_reason"]["type"]
        rows = meta["output_token_logprobs"] if token_ids else []  # absent where nothing was generated
        logprobs, logprob_ids = [row[0] for row in rows], [row[1] for row in rows]
        spans = meta.get("weight_versions") or [
            {"version": meta["weight_version"], "start": 0, "end": len(token_ids)}  # of releases before 0.5.2x
        ]
        policy_versions = versions_of_tokens(spans, len(token_ids))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise MalformedAnswer(f"SGLang server {server}: the answer of /generate cannot be read ({reason})") from None
    if logprob_ids != token_ids:
        raise MalformedAnswer(
            f"SGLang server {server}: /generate gave {len(token_ids)} tokens and log-probs of {len(rows)} others"
        )
    if finish_reason not in ("stop", "length", "abort"):
        raise MalformedAnswer(f"SGLang server {server}: unknown finish reason {finish_reason!r}")
    if len(token_ids) > num_asked or (finish_reason == "length" and len(token_ids) < num_asked):
        raise MalformedAnswer(
            f"SGLang server {server} ended a response at {len(token_ids)} tokens, {num_asked} were asked for: raise "
            "its context-length or max-total-tokens, or lower rollout.max_new_tokens"
        )
    if None in logprobs or not isfinite(sum(logprobs)):  # JSON has no NaN: it is null
        raise FloatingPointError(f"the log-probs of SGLang server {server} are not finite: its weights are broken")
    return Answer(token_ids, logprobs, policy_versions, finish_reason)


def versions_of_tokens(spans: Any, num_tokens: int) -> list[int]:
    """Policy versions [num_tokens] from (version, start, end) spans, which follow each other from token 0 on."""
    versions: list[int] = []
    for span in spans:
        version = 0 if span["version"] == UNSTAMPED else int(span["version"])
        versions += [version] * (span["end"] - max(span["start"], len(versions)))
    if len(versions) != num_tokens:
        raise ValueError(f"weight versions of {len(versions)} tokens, there are {num_tokens}")
    return versions


def may_ask_again(error: ServerError) -> bool:
    """No for what the server does not accept, whoever asks."""
    if isinstance(error, ServerRefusal):
        return error.status >= 500 or error.status in BUSY_STATUSES
    return not isinstance(error, MalformedAnswer)


def backoff_seconds(num_failures: int, index: int) -> float:
    """Twice as long each time; spread over requests, so that they do not come back together."""
    longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** (num_failures - 1))
    return longest * (0.5 + 0.5 * (index * 0.6180339887 % 1))
