"""Reads, writes and encodes supervised examples: a prompt and the response to imitate."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_oreal.config import SftDataConfig
from megatron_oreal.data.files import Row, read_jsonl, write_jsonl
from megatron_oreal.data.prompts import parse_messages, parse_text, row_error
from megatron_oreal.types import Message, TrainingSequence

if TYPE_CHECKING:
    from megatron_oreal.data.tokenizer import Tokenizer


@dataclass(slots=True, frozen=True)
class Example:
    messages: tuple[Message, ...]
    response: str  # without the end-of-sequence token


def read_examples(path: Path, setting: str = "data.examples") -> list[Example]:
    """Reads JSONL of {"prompt", "response"}; "prompt" as in `read_prompts`, other keys ignored.

    Raises ValueError, naming `setting` and the line, for a missing or empty file and a malformed line.
    """
    examples = []
    for number, row in read_jsonl(path, setting):
        try:
            examples.append(Example(parse_messages(row), parse_text(row, "response")))
        except ValueError as error:
            raise row_error(setting, path, number, error, row) from None
    return examples


def write_examples(path: Path, examples: Iterable[Example]) -> int:
    """Writes what `read_examples` reads; returns the number of examples."""
    return write_jsonl(path, map(example_row, examples))


def example_row(example: Example) -> Row:
    """Returns the JSON row of an example; it writes a single user message as a string."""
    if [message.role for message in example.messages] == ["user"]:
        return {"prompt": example.messages[0].content, "response": example.response}
    messages = [{"role": message.role, "content": message.content} for message in example.messages]
    return {"prompt": messages, "response": example.response}


def encode_examples(
    examples: Sequence[Example], tokenizer: Tokenizer, config: SftDataConfig
) -> tuple[list[TrainingSequence], int]:
    """Returns sequences that end with the end-of-sequence token, and how many examples were skipped as too long.

    If a prompt ends with an opening mark such as `<think>` that the response repeats, the response loses the mark.

    An example is too long when its prompt has more than `config.max_prompt_tokens` tokens, or both together more than
    `config.max_tokens`. Raises ValueError when all are skipped, when a prompt has no token, and where the tokenizer
    refuses the format.
    """
    prompts = tokenizer.encode_prompts([example.messages for example in examples], config)
    if [] in prompts:
        raise ValueError(f"data.examples: the prompt of example {prompts.index([]) + 1} gives no token; correct it")
    responses = tokenizer.encode_many(
        [
            tokenizer.without_opening(example.response, tokenizer.render_prompt(example.messages, config))
            for example in examples
        ]
    )
    sequences = [
        TrainingSequence(
            np.array(prompt_ids, dtype=np.int32),
            np.array([*response_ids, tokenizer.eos_id], dtype=np.int32),
            advantage=1.0,
            is_correct=True,
        )
        for prompt_ids, response_ids in zip(prompts, responses, strict=True)
    ]
    kept = [
        sequence
        for sequence in sequences
        if len(sequence.prompt_ids) <= config.max_prompt_tokens and sequence.num_tokens <= config.max_tokens
    ]
    if not kept:
        raise ValueError(
            f"data.max_tokens={config.max_tokens}, data.max_prompt_tokens={config.max_prompt_tokens}: each of the "
            f"{len(examples)} examples is longer; raise them"
        )
    return kept, len(examples) - len(kept)
