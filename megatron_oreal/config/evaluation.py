"""Defines the settings of `megatron-oreal eval`. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megatron_oreal.config.section import Section

DATASET_NAME = re.compile(r"\w[\w.+-]*")  # the name becomes a file name


class BenchmarkConfig(Section):
    """The settings of `megatron-oreal eval`: what it measures, and on which data sets."""

    prompts: dict[str, Path]  # The name of each data set and its file of JSON lines {"id", "prompt", "answer"}.
    greedy: bool = True  # Each question gets one answer at temperature 0.
    num_samples: int = Field(default=16, ge=0)  # The number n of answers to a question at rollout's temperature.
    pass_at: list[PositiveInt] | None = None  # The values of k for pass@k; null takes 2, 4, ... and n.
    majority_at: list[PositiveInt] | None = None  # The values of k for maj@k; null takes n.
    max_prompts: PositiveInt | None = None  # Only the first max_prompts questions of each data set are used; null: all.
    # The engine gets this many questions at a time; the samples' seeds depend on this number.
    prompts_per_batch: PositiveInt = 128
    confidence: float = Field(default=0.95, gt=0, lt=1)  # The confidence level of the intervals.
    num_resamples: PositiveInt = 10_000  # The number of bootstrap resamples of the questions.
    keep_responses: bool = True  # Writes the text of each answer beside its verdict.

    @model_validator(mode="after")
    def check(self) -> Self:
        if not self.prompts:
            raise ValueError("eval.prompts names no dataset: give eval.prompts.NAME=FILE.jsonl")
        for name in self.prompts:
            if not DATASET_NAME.fullmatch(name):
                raise ValueError(f"eval.prompts: {name!r} cannot name a file; use letters, digits and . _ + -")
        if not self.greedy and not self.num_samples:
            raise ValueError("eval.num_samples=0 with eval.greedy=false measures nothing: set one of them")
        for setting, counts in (("pass_at", self.pass_at), ("majority_at", self.majority_at)):
            largest = max(counts or [0])
            if largest > self.num_samples:
                raise ValueError(f"eval.{setting}: {largest} exceeds eval.num_samples={self.num_samples}; raise it")
        return self

    @property
    def pass_counts(self) -> list[int]:
        """Returns the values of k for pass@k. The default leaves out 1, because pass@1 is the mean."""
        n = self.num_samples
        powers = [2**exponent for exponent in range(1, n.bit_length()) if 2**exponent < n]
        return list(self.pass_at) if self.pass_at is not None else powers + [n] * (n > 1)

    @property
    def majority_counts(self) -> list[int]:
        return list(self.majority_at) if self.majority_at is not None else [self.num_samples] * (self.num_samples > 1)
