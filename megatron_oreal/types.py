"""Defines the dataclasses that modules pass to each other.

Shape letters: T packed tokens of a micro-batch, N sequences in it, G groups, M samples a group, P tokens of a prompt,
R tokens of a response. At position t, a field of T values holds what concerns the prediction of token t + 1, which is
`labels[t]`.

Token data are numpy arrays from the engine to the packer: ids and policy versions int32, log-probs float32. An empty
array stands for values that are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:  # The verifier's worker processes import this module, and no torch.
    from torch import Tensor

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
FinishReason = Literal["stop", "length", "abort"]
Metrics = dict[str, float]  # e.g. {"policy/grad_norm": 0.7, "time/rollout_seconds": 12.5}
Notify = Callable[[str], None]  # takes a line for the user; any thread may call it
# The fields of a micro-batch that a forward pass fills.
TokenStream = Literal["reference_logprobs", "old_logprobs", "token_scores", "values"]
# A sample with one of the last four has no verdict; every other status is a decision.
VerdictStatus = Literal[
    "correct", "incorrect", "no_answer", "too_long", "rejected", "timeout", "crash", "judge_failed", "reward_failed"
]
UNJUDGED: tuple[VerdictStatus, ...] = ("timeout", "crash", "judge_failed", "reward_failed")
JudgeOpinion = Literal["correct", "incorrect", "failed"]


@dataclass(slots=True, frozen=True)
class Message:
    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(slots=True, frozen=True)
class Prompt:
    """A question with its reference answer.

    Example: `Prompt("gsm8k-17", (Message("user", "What is 1 + 1?"),), "2", pass_rate=0.75, source="gsm8k")`.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    pass_rate: float | None = None  # measured before training, in [0, 1]
    source: str = ""  # the data set
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)  # whatever a reward of the user's own needs

    @property
    def question(self) -> str:
        return self.messages[-1].content


@dataclass(slots=True, frozen=True)
class Verdict:
    """The decision on one answer. Rules and judge give the reward 1.0 to "correct" answers and 0.0 to others.

    Example: `Verdict(1.0, "correct", "2")`, and for a verifier that ran out of time `Verdict(0.0, "timeout", None)`.
    An answer that the rules rejected and the judge accepted is `Verdict(1.0, "correct", "2", "incorrect", "correct")`.
    """

    reward: float
    status: VerdictStatus
    extracted: str | None  # the answer that the verifier found in the response
    rules: VerdictStatus | None = None  # what the rules said, where the judge was asked too
    judge: JudgeOpinion | None = None  # what the judge said; None where it was not asked

    @property
    def is_judged(self) -> bool:
        """Returns False if no decision was possible: no training treats such a sample as incorrect."""
        return self.status not in UNJUDGED


ARRAY_DTYPES: dict[object, DTypeLike] = {Int32Array: np.int32, Float32Array: np.float32}  # by annotation


class TokenData:
    """Base of the dataclasses that hold token arrays.

    A field annotated as `Int32Array` or `Float32Array` has that dtype, whatever the constructor was given: an array of
    this dtype is kept without a copy, a list or another array is converted. `==` compares the arrays' values, which the
    `__eq__` that a dataclass generates cannot do: subclasses are declared with `@dataclass(eq=False)`.

    Example: `GenerationRequest([5, 6], seed=0).prompt_ids` is `np.array([5, 6], dtype=np.int32)`.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        kind: type = type(self)
        for name, dtype in array_fields(kind):
            value = getattr(self, name)
            array = np.asarray(value, dtype)
            if array is not value:
                object.__setattr__(self, name, array)  # a plain assignment fails where the subclass is frozen

    def __eq__(self, other: object) -> bool:
        kind: type = type(self)
        names = field_names(kind)
        if kind is not type(other):
            return NotImplemented
        return all(is_equal(getattr(self, name), getattr(other, name)) for name in names)


@cache
def array_fields(kind: type) -> tuple[tuple[str, DTypeLike], ...]:
    """Returns the name and the dtype of each array field."""
    hints = get_type_hints(kind)
    return tuple((name, ARRAY_DTYPES[hints[name]]) for name in field_names(kind) if hints[name] in ARRAY_DTYPES)


@cache
def field_names(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


def is_equal(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    return one == other


def no_ids() -> Int32Array:
    return np.empty(0, dtype=np.int32)


def no_logprobs() -> Float32Array:
    return np.empty(0, dtype=np.float32)


@dataclass(slots=True, eq=False)
class Sample(TokenData):
    """A response with its verdict.

    Example, of weights that were replaced after the first token, by an engine that samples at a temperature:

        Sample(
            prompt_id="gsm8k-17", prompt_ids=[11, 12, 13], response_ids=[2, 15, 1], response_text="2}",
            rollout_logprobs=[-0.11, -0.5, -0.02], model_logprobs=[-0.2, -0.7, -0.05], finish_reason="stop",
            policy_version=6, verdict=Verdict(1.0, "correct", "2"), policy_versions=[6, 7, 7],
        )
    """

    prompt_id: str
    prompt_ids: Int32Array  # [P], shared by the samples of a group
    response_ids: Int32Array  # [R], the stop token included when one was produced
    response_text: str  # without the stop token
    # [R], log-probs of the sampled distribution: after temperature and truncation. Empty if the engine cannot tell.
    rollout_logprobs: Float32Array
    model_logprobs: Float32Array  # [R], log-probs of the untempered, untruncated model; empty where not known
    finish_reason: FinishReason
    policy_version: int  # the version of the weights that generated the oldest token
    verdict: Verdict | None = None
    policy_versions: Int32Array = field(default_factory=no_ids)  # [R]; empty: each token is of `policy_version`

    @property
    def reward(self) -> float:
        return self.verdict.reward if self.verdict is not None else 0.0

    @property
    def is_correct(self) -> bool:
        return self.verdict is not None and self.verdict.status == "correct"

    @property
    def is_judged(self) -> bool:
        return self.verdict is not None and self.verdict.is_judged


@dataclass(slots=True)
class Group:
    """A prompt and its samples, which are judged and weighted together."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def judged_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.is_judged]

    @property
    def pass_rate(self) -> float:
        """Returns the share of judged samples that are correct, or 0 if there is no judged sample."""
        judged = self.judged_samples
        return sum(sample.is_correct for sample in judged) / len(judged) if judged else 0.0


@dataclass(slots=True, eq=False)
class TrainingSequence(TokenData):
    """One sequence to train on, before packing.

    Example: `TrainingSequence(prompt_ids=[11, 12], response_ids=[13, 1], advantage=0.5, is_correct=True)` is trained on
    the predictions of 13 and 1.
    """

    prompt_ids: Int32Array  # [P]
    response_ids: Int32Array  # [R]
    advantage: float
    is_correct: bool
    # [R], the engine's, as in Sample; empty if unknown.
    model_logprobs: Float32Array = field(default_factory=no_logprobs)
    rollout_logprobs: Float32Array = field(default_factory=no_logprobs)

    @property
    def token_ids(self) -> Int32Array:
        """Returns the tokens of prompt and response, [P + R]."""
        return np.concatenate([self.prompt_ids, self.response_ids])

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(slots=True)
class Microbatch:
    """Sequences packed one after the other; a filler segment of masked tokens may follow them.

    Example: the sequences (prompt 11 12, response 13 1) and (prompt 21, response 22), and a filler of one token:

        input_ids    = [11, 12, 13, 1, 21, 22, 0]
        position_ids = [0, 1, 2, 3, 0, 1, 0]
        cu_seqlens   = [0, 4, 6, 7]
        loss_mask    = [F, T, T, F, T, F, F]   # position 1 predicts token 13, position 2 token 1, position 4 token 22
        sequence_ids = [0, 0, 0, 0, 1, 1, 2]
    """

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, the next token of the same sequence
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [N + 1] int32, the filler's segment included
    max_seqlen: int
    loss_mask: Tensor  # [T] bool, True where labels[t] is trained
    sequence_ids: Tensor  # [T] int64, index into [N]
    advantages: Tensor  # [T] float32, 0 outside the loss mask
    is_correct: Tensor  # [N] bool
    # [T] float32, the engine's log-probs of the sampled tokens in the distribution that is trained: at the rollout's
    # temperature, before any truncation. NaN where they are unknown.
    engine_logprobs: Tensor
    # The following fields hold the positions of the trained tokens. Packing computes them on the host: selecting by
    # them never waits for the device, unlike selecting by a mask.
    lengths: tuple[int, ...]  # tokens of each sequence, the filler's included
    trained: Tensor  # [T'] int64, rising positions t where loss_mask[t]
    trained_correct: Tensor  # [C] int64, those of correct sequences
    trained_incorrect: Tensor  # [I] int64, the others
    trained_places: Tensor  # [T'] int64, each trained token's index in its sequence's response
    longest_response: int  # trained tokens of the longest response, at least 1
    reference_logprobs: Tensor | None = None  # [T]
    old_logprobs: Tensor | None = None  # [T]
    token_scores: Tensor | None = None  # [T] the reward model's, before its update
    token_weights: Tensor | None = None  # [T] in [0, 1], or of mean one
    coefficients: Tensor | None = None  # [T] what the policy's log-probs are weighted with
    shares: Tensor | None = None  # [T] what a token weighs in the loss, before its sequence's weight
    penalties: Tensor | None = None  # [T] the weights of |log ratio| of the tokens that are held back
    values: Tensor | None = None  # [T] the critic's
    returns: Tensor | None = None  # [T] what the critic is trained towards
    # The tokens that top_p and top_k keep at each trained token (kernels.kept_logprob.KeptTokens). With
    # rollout.loss_support=sampled, the first pass of the policy chooses them, and its losses normalise over them.
    kept_tokens: object | None = None
    packed: object | None = None  # what the attention derived from cu_seqlens, kept for the next pass
    part: ContextPart | None = None  # this rank's tokens; None without context parallelism

    @property
    def num_sequences(self) -> int:
        return int(self.is_correct.numel())


@dataclass(slots=True)
class ContextPart:
    """One context-parallel rank's tokens of a micro-batch; see data/context.py. L tokens of each of C ranks.

    The models see these; algorithms, losses and metrics see the whole micro-batch, on every rank.
    """

    tokens: Microbatch  # [L] tokens in place of [T], and the model's `packed` and `kept_tokens` for them
    restore: Tensor  # [T] int64, where token t stands among the tokens of all ranks, one rank after the other


@dataclass(slots=True)
class Batch:
    """One data-parallel rank's micro-batches. The counts are sums over all ranks, except `num_padding_tokens`."""

    microbatches: list[Microbatch]
    num_sequences: int
    num_tokens: int  # trained tokens
    num_correct_tokens: int
    num_incorrect_tokens: int
    num_correct_sequences: int = 0
    num_padding_tokens: int = 0  # on this rank


@dataclass(slots=True)
class TokenOutputs:
    """The values that a model's head computes for a micro-batch."""

    values: Tensor  # [T] log-probs of the labels (0 outside the loss mask), or scores
    entropy: Tensor | None  # [T] of the policy, in nats


@dataclass(slots=True)
class LossOutput:
    loss: Tensor  # scalar, this micro-batch's share of the global loss
    metrics: dict[str, Tensor]  # scalars, summed over micro-batches and ranks; names in _max: their maximum
