"""Reads and writes prompts, encodes them, and decides in which order training sees them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from megatron_oreal.config import PromptConfig
from megatron_oreal.data.files import Row, describe_type, read_jsonl, write_jsonl
from megatron_oreal.rewards.references import check_reference
from megatron_oreal.types import Int32Array, Message, Prompt, TokenData

if TYPE_CHECKING:
    from megatron_oreal.data.tokenizer import Tokenizer

Item = TypeVar("Item")
PLAIN_DECIMAL = re.compile(r"-?\d+\.\d+")
MAX_KEYS, MAX_KEY = 10, 40  # An error names so many keys of a row, each with so many characters.
CursorState = dict[str, Any]  # JSON


@dataclass(slots=True, frozen=True, eq=False)
class EncodedPrompt(TokenData):
    """A prompt as the model reads it: after the chat template, the system prompt and the suffix."""

    prompt: Prompt
    token_ids: Int32Array  # [P]


def read_prompts(path: Path, setting: str) -> list[Prompt]:
    """Reads JSONL of {"id", "prompt", "answer", "source", "pass_rate", "meta"}.

    The last three are optional, other keys are ignored. Rewards of the user's own receive the object "meta".

    "prompt" is a list of {"role", "content"}, or a string for one user message. Raises ValueError, naming `setting` and
    the line, for a missing or empty file, a malformed line, an id that occurs twice, and an answer that no response can
    be judged by.
    """
    prompts: dict[str, Prompt] = {}
    for number, row in read_jsonl(path, setting):
        try:
            prompt = parse_prompt(row)
            check_reference(prompt.answer)
            if prompt.id in prompts:
                raise ValueError(f"id {prompt.id!r} occurs twice; ids must be unique")
        except ValueError as error:
            raise row_error(setting, path, number, error, row) from None
        prompts[prompt.id] = prompt
    return list(prompts.values())


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> int:
    """Writes what `read_prompts` reads; returns the number of prompts."""
    return write_jsonl(path, map(prompt_row, prompts))


def prompt_row(prompt: Prompt) -> Row:
    return {
        "id": prompt.id,
        "prompt": [{"role": message.role, "content": message.content} for message in prompt.messages],
        "answer": prompt.answer,
        "source": prompt.source,
        "pass_rate": prompt.pass_rate,
        **({"meta": dict(prompt.metadata)} if prompt.metadata else {}),
    }


def parse_prompt(row: Row) -> Prompt:
    """Turns a row into a prompt. Raises ValueError that names the key and the fix."""
    pass_rate = row.get("pass_rate")
    if pass_rate is not None and not (is_number(pass_rate) and 0 <= pass_rate <= 1):
        raise ValueError(f"pass_rate must be a number from 0 to 1, or null, got {pass_rate!r}")
    source = row.get("source", "")
    if not isinstance(source, str):
        raise ValueError(f"source must be a string, not {describe_type(source)}")
    metadata = {} if row.get("meta") is None else row["meta"]
    if not isinstance(metadata, dict):
        raise ValueError(f"meta must be an object, not {describe_type(metadata)}")
    return Prompt(
        id=parse_text(row, "id"),
        messages=parse_messages(row),
        answer=parse_text(row, "answer"),
        pass_rate=None if pass_rate is None else float(pass_rate),
        source=source,
        metadata=metadata,
    )


def parse_text(row: Row, key: str) -> str:
    """Returns a non-empty string, or a number as text; refuses numbers that JSON does not keep exactly (NaN, 1e22)."""
    value = row.get(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f"{what_is_missing(row, key)}; give a non-empty string")
    if not isinstance(value, str) and not is_number(value):
        raise ValueError(f"{key} must be a string, not {describe_type(value)}")
    text = str(value)
    if isinstance(value, float) and not PLAIN_DECIMAL.fullmatch(text):
        raise ValueError(f"{key} is the number {text}; write it as a string")
    return text


def what_is_missing(row: Row, key: str) -> str:
    """Says whether a key is null, empty or missing."""
    return f"{key} is {'missing' if key not in row else 'null' if row[key] is None else 'empty'}"


def row_error(setting: str, path: Path, number: int, error: ValueError, row: Row) -> ValueError:
    """Makes the error about a row of a file; if a key is missing, the error names the keys that the row has."""
    found = ""
    if " is missing; " in str(error) and row:
        names = ", ".join(name[:MAX_KEY] for name in list(row)[:MAX_KEYS])
        found = f"; the keys found are {names}{', ...' if len(row) > MAX_KEYS else ''}"
    return ValueError(f"{setting}: {path} line {number}: {error}{found}")


def parse_messages(row: Row) -> tuple[Message, ...]:
    value = row.get("prompt")
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise ValueError(f'{what_is_missing(row, "prompt")}; give a string or a list of {{"role", "content"}}')
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list):
        raise ValueError(f'prompt must be a string or a list of {{"role", "content"}}, not {describe_type(value)}')
    messages = []
    for message in value:
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError('each message of prompt must be {"role": string, "content": string}')
        messages.append(Message(role, content))
    return tuple(messages)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, config: PromptConfig, setting: str = "data.prompts"
) -> tuple[list[EncodedPrompt], int]:
    """Returns the prompts with their token ids, and the number that is longer than `config.max_prompt_tokens`.

    Raises ValueError if all are too long or one has no token, and if the tokenizer does not support the format.
    `setting` names the configuration's field that holds the prompts' path, for errors.
    """
    token_ids = tokenizer.encode_prompts([prompt.messages for prompt in prompts], config)
    if [] in token_ids:
        raise ValueError(f"{setting}: prompt {prompts[token_ids.index([])].id!r} gives no token; remove or correct it")
    encoded = [
        EncodedPrompt(prompt, np.array(ids, dtype=np.int32))
        for prompt, ids in zip(prompts, token_ids, strict=True)
        if len(ids) <= config.max_prompt_tokens
    ]
    if not encoded:
        raise ValueError(
            f"data.max_prompt_tokens={config.max_prompt_tokens}: each of the {len(prompts)} prompts is longer; "
            f"raise it to {min(map(len, token_ids), default=1)} or more for {setting}"
        )
    return encoded, len(prompts) - len(encoded)


def repeat_by_pass_rate(prompts: Sequence[Prompt], rules: Sequence[tuple[float, int]]) -> list[Prompt]:
    """Repeats each prompt by the first rule (upper bound, repeats) whose bound is above the prompt's pass rate.

    A prompt at or above the last bound is dropped; one without a pass rate is kept once. Without rules all are kept.
    Raises ValueError when nothing is left, and when no prompt has a pass rate.
    """
    if not rules:
        return list(prompts)
    if all(prompt.pass_rate is None for prompt in prompts):
        raise ValueError(
            "data.repeats_by_pass_rate has no effect: no prompt has a pass_rate; measure them with `megatron-oreal "
            "passrate`, or drop it"
        )
    repeated: list[Prompt] = []
    for prompt in prompts:
        repeats = 1
        if prompt.pass_rate is not None:
            repeats = next((repeats for bound, repeats in rules if prompt.pass_rate < bound), 0)
        repeated += [prompt] * repeats
    if not repeated:
        raise ValueError(f"data.repeats_by_pass_rate drops each of the {len(prompts)} prompts; raise its last bound")
    return repeated


@dataclass(slots=True, frozen=True)
class Turn:
    """The use of one item in the order of training.

    Example: `Turn(17)` is the first use of item 17; `Turn(17, "0/3/5")` is item 17 after step 3 gave it back.
    """

    index: int  # of the item
    # The seeds of the samples depend on this text; if it is empty, they depend on the item's place in the batch.
    origin: str = ""


class PromptCursor(Generic[Item]):
    """Hands out the items in batches, each item once an epoch; a batch may hold items of two epochs.

    The order of an epoch depends on (seed, epoch) alone, so two numbers, and the turns that were given back, are enough
    to continue a run.
    """

    def __init__(self, prompts: Sequence[Item], shuffle: bool, seed: int) -> None:
        if not prompts:
            raise ValueError("data.prompts holds no prompt to train on; give at least one")
        self.prompts = prompts
        self.shuffle = shuffle
        self.seed = seed
        self.returned: list[Turn] = []  # the turns that were given back, in the order of their next use
        self._start_epoch(0)

    @property
    def epoch(self) -> int:
        """Returns the number of finished passes over the prompts."""
        return self._epoch

    def next_batch(self, count: int) -> list[Item]:
        return [self.prompts[turn.index] for turn in self.next_turns(count)]

    def next_turns(self, count: int) -> list[Turn]:
        """Returns the next `count` turns: first the turns that were given back, then new ones."""
        turns, self.returned = self.returned[:count], self.returned[count:]
        while len(turns) < count:
            taken = self._order[self._position : self._position + count - len(turns)]
            turns += map(Turn, taken)
            self._position += len(taken)
            if self._position == len(self._order):
                self._start_epoch(self._epoch + 1)
        return turns

    def give_back(self, turns: Sequence[Turn]) -> None:
        """Puts these turns in front of all others."""
        self.returned = [*turns, *self.returned]

    def copy(self) -> PromptCursor[Item]:
        """Returns an independent cursor at the same position."""
        cursor = PromptCursor(self.prompts, self.shuffle, self.seed)
        cursor.restore(self.state())
        return cursor

    def state(self) -> CursorState:
        """Returns what `restore` needs to continue at this position; it can be written as JSON."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self.seed,
            "num_prompts": len(self.prompts),
            "returned": [[turn.index, turn.origin] for turn in self.returned],
        }

    def restore(self, state: CursorState) -> None:
        """Continues where `state` was taken, in its order. Raises ValueError when the number of prompts differs."""
        if state["num_prompts"] != len(self.prompts):
            raise ValueError(
                f"data.prompts: the run was saved with {state['num_prompts']} prompts an epoch and now has "
                f"{len(self.prompts)}; keep the file, data.max_prompt_tokens and data.repeats_by_pass_rate"
            )
        if (self.seed, self._epoch) != (state["seed"], state["epoch"]):
            self.seed = state["seed"]
            self._start_epoch(state["epoch"])
        self._position = state["position"]
        # A checkpoint of a run without over-sampling has none.
        self.returned = [Turn(index, origin) for index, origin in state.get("returned", [])]

    def _start_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._position = 0
        self._order = list(range(len(self.prompts)))
        if self.shuffle:
            # Python derives the seed from the string's SHA-512, so no Python version or hash seed changes it.
            random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
