"""The data that crosses module borders.

Shape letters: T packed tokens of a micro-batch, N sequences in it, G groups, M samples a group.
A per-token field at position t speaks about the prediction of token t + 1, `labels[t]`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]
TokenStream = Literal["reference_logprobs", "old_logprobs", "token_scores", "values"]  # filled by a forward pass
# "judged" statuses carry a verdict on the answer; the others say why there is none.
VerdictStatus = Literal["correct", "incorrect", "no_answer", "too_long", "rejected", "timeout", "crash"]


@dataclass(slots=True, frozen=True)
class Message:
    role: str
    content: str


@dataclass(slots=True, frozen=True)
class Prompt:
    id: str
    messages: tuple[Message, ...]
    answer: str
    pass_rate: float | None = None  # measured before training, in [0, 1]
    source: str = ""


@dataclass(slots=True, frozen=True)
class Verdict:
    """The verifier's word on one answer; `reward` is 0.0 unless the status is "correct"."""

    reward: float
    status: VerdictStatus
    extracted: str | None

    @property
    def is_judged(self) -> bool:
        """False when the verifier could not decide: such a sample is never trained on as wrong."""
        return self.status not in ("timeout", "crash")


@dataclass(slots=True)
class Sample:
    prompt_id: str
    prompt_ids: list[int]
    response_ids: list[int]  # the stop token included when one was produced
    response_text: str  # without the stop token
    # Of the distribution that was sampled from: tempered, truncated. Empty where the engine cannot tell.
    rollout_logprobs: list[float]
    model_logprobs: list[float]  # of the untempered, untruncated model
    finish_reason: FinishReason
    policy_version: int  # of the weights that made its oldest token
    verdict: Verdict | None = None
    policy_versions: list[int] = field(default_factory=list)  # a token; empty: all are of policy_version

    @property
    def is_correct(self) -> bool:
        return self.verdict is not None and self.verdict.status == "correct"

    @property
    def is_judged(self) -> bool:
        return self.verdict is not None and self.verdict.is_judged


@dataclass(slots=True)
class Group:
    prompt: Prompt
    samples: list[Sample]

    @property
    def judged_samples(self) -> list[Sample]:
        return [sample for sample in self.samples if sample.is_judged]

    @property
    def pass_rate(self) -> float:
        """The share of judged samples that are correct; 0 without any judged sample."""
        judged = self.judged_samples
        return sum(sample.is_correct for sample in judged) / len(judged) if judged else 0.0


@dataclass(slots=True)
class TrainingSequence:
    """One sequence to train on, before packing."""

    prompt_ids: list[int]
    response_ids: list[int]
    advantage: float
    is_correct: bool
    model_logprobs: list[float] = field(default_factory=list)  # the engine's

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(slots=True)
class Microbatch:
    """Sequences packed one after the other; a filler of masked tokens may close it."""

    input_ids: Tensor  # [T] int64
    labels: Tensor  # [T] int64, the next token of the same sequence
    position_ids: Tensor  # [T] int64
    cu_seqlens: Tensor  # [N + 1] int32, the filler's segment included
    max_seqlen: int
    loss_mask: Tensor  # [T] bool, True where labels[t] is trained
    sequence_ids: Tensor  # [T] int64, index into [N]
    advantages: Tensor  # [T] float32
    is_correct: Tensor  # [N] bool
    engine_logprobs: Tensor  # [T] float32, untempered: the engine's of the sampled tokens, NaN where unknown
    # The following say where the trained tokens are. Packing computes them on the host, so that selecting trained
    # tokens never waits for the device, as selecting by a mask would.
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
    values: Tensor | None = None  # [T]
    returns: Tensor | None = None  # [T]
    packed: object | None = None  # what the attention derived from cu_seqlens, kept for the next pass

    @property
    def num_sequences(self) -> int:
        return int(self.is_correct.numel())


@dataclass(slots=True)
class Batch:
    """One data-parallel rank's micro-batches; the counts are global, over all ranks."""

    microbatches: list[Microbatch]
    num_sequences: int
    num_tokens: int  # trained tokens
    num_correct_tokens: int
    num_incorrect_tokens: int
    num_correct_sequences: int = 0
    num_padding_tokens: int = 0  # on this rank


@dataclass(slots=True)
class TokenOutputs:
    """What a head gives for a micro-batch."""

    values: Tensor  # [T] log-probs of the labels (0 outside the loss mask), or scores
    entropy: Tensor | None  # [T] of the policy, in nats


@dataclass(slots=True)
class LossOutput:
    loss: Tensor  # scalar, this micro-batch's share of the global loss
    metrics: dict[str, Tensor]  # scalars, summed over micro-batches and ranks; names in _max: their maximum
