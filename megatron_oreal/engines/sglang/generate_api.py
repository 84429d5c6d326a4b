"""Defines the requests to a server's /generate and the meaning of its answers, which are token ids, never text.

Measured with SGLang 0.5.23: log-probs belong to the untempered, untruncated model if the server runs with
SGLANG_RETURN_ORIGINAL_LOGPROB=1, as our servers do. With both `top_k` and `top_p`, its `top_p` uses the mass of all
tokens. `sampling_seed` has an effect only with --enable-deterministic-inference. A token's random numbers depend on the
seed and on its position in the whole sequence, so a response that is continued with the same seed equals the
uninterrupted one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import numpy as np

from megatron_oreal.engines.engine import Generation, GenerationRequest, SamplingParams
from megatron_oreal.engines.local.token_sampling import as_int64
from megatron_oreal.engines.sglang.client import MalformedAnswer, ServerError, ServerRefusal
from megatron_oreal.engines.sglang.weight_labels import run_of, version_of
from megatron_oreal.engines.stop_strings import Decode, holds_stop
from megatron_oreal.types import FinishReason, Float32Array, Int32Array, TokenData, no_ids, no_logprobs

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.25, 8.0
BUSY_STATUSES = (408, 429)  # statuses of a server that is only overloaded
LARGEST_ID = np.iinfo(np.int32).max


@dataclass(slots=True, frozen=True, eq=False)
class Chunk(TokenData):
    """The tokens that one request added to a response: three arrays of one length."""

    token_ids: Int32Array
    model_logprobs: Float32Array
    policy_versions: Int32Array
    finish_reason: FinishReason
    # The runs that sent the weights; "" for weights that the server has read from disk
    runs: frozenset[str] = frozenset()
    matched_token: bool = False  # whether an end token ended it, not a stop string


@dataclass(slots=True, eq=False)
class PartialResponse:
    """A partial response: the tokens of `begun` and of the answers so far, in arrays of one length.

    Each answer replaces the arrays by longer ones, so an earlier `Generation` keeps its own.
    """

    request: GenerationRequest
    params: SamplingParams
    token_ids: Int32Array = field(default_factory=no_ids)
    rollout_logprobs: Float32Array | None = field(default_factory=no_logprobs)  # None: unknown
    model_logprobs: Float32Array = field(default_factory=no_logprobs)
    policy_versions: Int32Array = field(default_factory=no_ids)
    decode: Decode | None = None  # None: stop strings are not sent
    ends_with_stop_string: bool = False
    # The server may know end tokens that no file of the model names; continuing would cost one request per token.
    ends_with_token_of_server: bool = False

    @classmethod
    def of(cls, request: GenerationRequest, params: SamplingParams, decode: Decode | None = None) -> PartialResponse:
        begun = request.begun
        if begun is None:
            return cls(request, params, decode=decode)
        is_known = len(begun.rollout_logprobs) == len(begun.response_ids)
        return cls(
            request,
            params,
            begun.response_ids,
            begun.rollout_logprobs if is_known else None,
            begun.model_logprobs,
            begun.policy_versions,
            decode,
        )

    @property
    def num_missing(self) -> int:
        """Returns the number of tokens that may still come."""
        if self.has_stopped:
            return 0
        return max(0, self.params.longest_response(len(self.request.prompt_ids)) - len(self.token_ids))

    @property
    def has_stopped(self) -> bool:
        return (
            self.ends_with_stop_string
            or self.ends_with_token_of_server
            or (len(self.token_ids) > 0 and int(self.token_ids[-1]) in self.params.stop_token_ids)
        )

    @property
    def sends_stop_strings(self) -> bool:
        return bool(self.params.stop_strings) and self.decode is not None

    def body(self, request_id: str) -> dict[str, Any]:
        """Returns the body of the next request, which asks for the missing tokens."""
        params = self.params
        # The server would cut its text at a stop string; the token ids are complete in any case.
        stops = {"stop": list(params.stop_strings), "no_stop_trim": True} if self.sends_stop_strings else {}
        return {
            "rid": request_id,
            "input_ids": np.concatenate([self.request.prompt_ids, self.token_ids]).tolist(),
            "sampling_params": {
                "temperature": params.temperature,
                "top_p": params.top_p,
                "top_k": params.top_k or -1,
                "max_new_tokens": self.num_missing,
                "stop_token_ids": list(params.stop_token_ids),
                "ignore_eos": not params.stop_token_ids,  # true would also ignore stop_token_ids, but no stop string
                "sampling_seed": as_int64(self.request.seed),
                **stops,
            },
            "return_logprob": True,
        }

    def add(self, answer: Chunk) -> None:
        if not len(answer.token_ids):
            return
        self.token_ids = np.concatenate([self.token_ids, answer.token_ids])
        self.model_logprobs = np.concatenate([self.model_logprobs, answer.model_logprobs])
        self.policy_versions = np.concatenate([self.policy_versions, answer.policy_versions])
        # If there are none, end tokens had to be ignored
        if answer.finish_reason == "stop" and self.params.stop_token_ids:
            self.ends_with_token_of_server = answer.matched_token or not self.sends_stop_strings
        if answer.finish_reason == "stop" and self.params.stop_strings and self.decode is not None:
            # The server also checks the text of special tokens, which ours may leave out; then the response continues.
            self.ends_with_stop_string = holds_stop(self.token_ids, self.params.stop_strings, self.decode)
        if self.params.temperature == 0:
            added = np.zeros_like(answer.model_logprobs)
        elif self.params.temperature == 1 and self.params.top_p == 1 and self.params.top_k == 0:
            added = answer.model_logprobs
        else:
            self.rollout_logprobs = None
        if self.rollout_logprobs is not None:
            self.rollout_logprobs = np.concatenate([self.rollout_logprobs, added])

    def generation(self) -> Generation:
        """Returns the response so far, which is aborted if tokens are missing."""
        finish_reason: FinishReason = "stop" if self.has_stopped else "abort" if self.num_missing else "length"
        rollout_logprobs = no_logprobs() if self.rollout_logprobs is None else self.rollout_logprobs
        return Generation(self.token_ids, rollout_logprobs, self.model_logprobs, finish_reason, self.policy_versions)


def read_chunk(answer: Any, num_asked: int, server: object, vocab_size: int = LARGEST_ID) -> Chunk:
    """Raises MalformedAnswer naming the server, and FloatingPointError for non-finite log-probs.

    num_asked: the number of requested tokens, which a response of finish reason "length" must have. vocab_size: of the
    model.
    """
    try:
        token_ids = read_ids(answer["output_ids"], vocab_size)
        meta = answer["meta_info"]
        finish_reason = meta["finish_reason"]["type"]
        matched_token = isinstance(meta["finish_reason"].get("matched"), int)
        rows = meta["output_token_logprobs"] if len(token_ids) else []  # absent if nothing was generated
        # null, which is NaN in JSON, becomes NaN
        logprobs = np.fromiter(map(itemgetter(0), rows), np.float32, len(rows))
        logprob_ids = list(map(itemgetter(1), rows))
        spans = meta.get("weight_versions") or [
            {"version": meta["weight_version"], "start": 0, "end": len(token_ids)}  # for releases before 0.5.2x
        ]
        policy_versions = versions_of_tokens(spans, len(token_ids))
        run_ids = frozenset(run_of(str(span["version"])) for span in spans)
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise MalformedAnswer(f"SGLang server {server}: the answer of /generate cannot be read ({reason})") from None
    if logprob_ids != answer["output_ids"]:
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
    if not np.isfinite(logprobs).all():
        raise FloatingPointError(f"the log-probs of SGLang server {server} are not finite: its weights are broken")
    return Chunk(token_ids, logprobs, policy_versions, finish_reason, run_ids, matched_token)


def read_ids(values: Any, vocab_size: int = LARGEST_ID) -> Int32Array:
    """Returns the ids of a JSON list. Raises ValueError if it holds anything but integers that can be token ids."""
    ids = np.array(values)
    if not isinstance(values, list) or ids.ndim != 1 or (values and ids.dtype.kind != "i"):
        raise ValueError("output_ids is not a list of integers")
    if values and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ValueError(f"output_ids has an integer that is not a token id below {vocab_size}")
    return ids.astype(np.int32)


def versions_of_tokens(spans: Any, num_tokens: int) -> Int32Array:
    """Returns policy versions [num_tokens] from consecutive (version, start, end) spans that begin at token 0.

    Example: version 3 up to token 2 and version 4 up to token 3 give [3, 3, 4].
    """
    versions: list[int] = []
    counts: list[int] = []
    for span in spans:
        versions.append(version_of(str(span["version"])))
        counts.append(max(0, span["end"] - max(span["start"], sum(counts))))
    if sum(counts) != num_tokens:
        raise ValueError(f"weight versions of {sum(counts)} tokens, there are {num_tokens}")
    return np.repeat(np.array(versions, dtype=np.int32), counts)


class WeightsOfAnotherRun(ServerError):
    """Another run has sent its weights to a server that this run uses."""


def check_weights_of(answer: Chunk, run_id: str, oldest: int, server: object) -> None:
    """Raises ServerError unless the answer is from this run's weights of version `oldest` or later.

    run_id: of this run; "" before it has sent weights, while servers have those from disk. Raises WeightsOfAnotherRun
    if a retry is useless.
    """
    if others := answer.runs - {run_id, ""}:
        raise WeightsOfAnotherRun(
            f"SGLang server {server} has weights of another run ({', '.join(sorted(others))}), which has sent them "
            "there meanwhile: give each run servers of its own"
        )
    if (run_id and "" in answer.runs) or (answer.policy_versions < oldest).any():
        raise ServerError(f"SGLang server {server} has weights older than version {oldest}")


def may_ask_again(error: ServerError) -> bool:
    """Says whether a retry makes sense. It does not for requests that the server refuses from everyone."""
    if isinstance(error, ServerRefusal):
        return error.status >= 500 or error.status in BUSY_STATUSES
    return not isinstance(error, (MalformedAnswer, WeightsOfAnotherRun))


def backoff_seconds(num_failures: int, index: int) -> float:
    """Returns a wait that doubles each time, with random spread, so that requests do not return together."""
    longest = min(LONGEST_BACKOFF_SECONDS, FIRST_BACKOFF_SECONDS * 2 ** (num_failures - 1))
    return longest * (0.5 + 0.5 * (index * 0.6180339887 % 1))
