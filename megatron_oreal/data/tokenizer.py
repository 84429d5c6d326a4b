"""Encodes messages as token ids, and decodes them, with a Hugging Face tokenizer; only loading one imports torch.

If a directory has `tokenizer.json`, that file defines the tokenizer: transformers 5 rebuilds the tokenizer of some
model types from its vocabulary alone and then splits text differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megatron_oreal.config import PromptConfig
    from megatron_oreal.data.sentencepiece_tokenizer import SentencePieceBackend
    from megatron_oreal.types import Int32Array, Message

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


# Special tokens with such names structure a response, like `</think>`, and stay in its text; others are left out.
MARK_NAME = re.compile("think|thought|reason|reflect|answer|solution|conclu", re.IGNORECASE)
# It matches an opening mark and white space at the end of a prompt: <think>, [THINK], ◁think▷.
OPENING_MARK = re.compile(r"((?:<[A-Za-z|][^<>\s/]*>|\[[A-Z]+\]|◁[a-z]+▷))(\s*)$")
# A placeholder for a special token's name in the contents of messages, while a chat template renders them.
PLACEHOLDER = "\ue000{}\ue001"
PLACEHOLDERS = re.compile("\ue000(\\d+)\ue001")


class Tokenizer:
    """Encodes prompts. Only a template, or the tokenizer's own post-processor, can write special tokens.

    The contents of messages are text: the name of a special token in them is encoded as text.
    """

    def __init__(self, backend: PreTrainedTokenizerBase | SentencePieceBackend) -> None:
        self.backend: Any = backend
        eos_id: Any = backend.eos_token_id
        self.eos_id: int = eos_id
        self.vocab_size: int = len(backend)  # includes the added tokens
        self.special = special_tokens(backend)
        ends = {backend.eos_token_id, backend.unk_token_id}
        self.marks = {number for name, number in self.special.items() if MARK_NAME.search(name)} - ends
        self.silent_ids = set(self.special.values()) - self.marks
        self.control_ids = set(self.special.values()) - {backend.unk_token_id}
        names = sorted(self.special, key=len, reverse=True)  # longest first, because one name may begin like another
        self.masked_names = [*names, PLACEHOLDER[0]]
        self.special_names = re.compile("|".join(map(re.escape, self.masked_names)))
        self.special_splitter = re.compile("(" + ("|".join(map(re.escape, names)) or "(?!)") + ")")
        self.prefix_ids = prefix_ids(backend)

    def render_prompt(self, messages: Sequence[Message], config: PromptConfig) -> str:
        """Returns the text that `encode_prompt` encodes: the messages, `config.system_prompt` and `config.suffix`.

        Raises ValueError if the messages do not fit `config`, and for format "chat" without a chat template.
        """
        return self._unmask(self._render_masked(messages, config))

    def _render_masked(self, messages: Sequence[Message], config: PromptConfig) -> str:
        """Returns the text of a prompt, with placeholders for the names of special tokens in the messages.

        The configuration's own texts, `system_prompt`, `suffix` and `template`, may name special tokens.
        """
        turns = [(message.role, self._mask(message)) for message in messages]
        if config.system_prompt is not None and all(role != "system" for role, _ in turns):
            turns.insert(0, ("system", config.system_prompt))
        if config.suffix:
            last = max((i for i, (role, _) in enumerate(turns) if role == "user"), default=None)
            if last is None:
                raise ValueError("data.suffix needs a user message to follow: leave it empty, or give each prompt one")
            turns[last] = ("user", turns[last][1] + config.suffix)
        if config.template is not None:
            last_user = next((content for role, content in reversed(turns) if role == "user"), "")
            return config.template.replace("{prompt}", last_user)
        if config.format == "plain":
            return "".join(content for _, content in turns)
        if self.backend.chat_template is None:
            raise ValueError("data.format=chat: the tokenizer has no chat template; set data.format=plain")
        conversation = [{"role": role, "content": content} for role, content in turns]
        try:
            text = self.backend.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"data.format=chat: the chat template refuses the messages ({reason}); set data.format=plain"
            ) from None
        return str(text)

    def _mask(self, message: Message) -> str:
        """Replaces special tokens' names, but not `</think>` in an assistant's turn, which templates look for."""

        def masked(match: re.Match[str]) -> str:
            is_read = message.role == "assistant" and "think" in match[0].lower()
            return match[0] if is_read else PLACEHOLDER.format(self.masked_names.index(match[0]))

        return self.special_names.sub(masked, message.content)

    def _unmask(self, text: str) -> str:
        return PLACEHOLDERS.sub(lambda match: self.masked_names[int(match[1])], text)

    def encode_prompt(self, messages: Sequence[Message], config: PromptConfig) -> list[int]:
        """Returns a prompt's token ids, with the chat template's opening of the answer. Errors: see `render_prompt`."""
        return self.encode_prompts([messages], config)[0]

    def encode_prompts(self, prompts: Sequence[Sequence[Message]], config: PromptConfig) -> list[list[int]]:
        """Encodes prompts as `encode_prompt` does, but several times faster. A prompt without text has no token."""
        texts = [self._render_masked(messages, config) for messages in prompts]
        plain = iter(self.encode_many([text for text in texts if not PLACEHOLDERS.search(text)]))
        encoded = [self._encode_masked(text) if PLACEHOLDERS.search(text) else next(plain) for text in texts]
        if config.format == "chat" and config.template is None:
            return encoded  # The chat template already writes the prefix that the model expects.
        return [with_prefix(ids, self.prefix_ids) for ids in encoded]

    def _encode_masked(self, text: str) -> list[int]:
        """Encodes the stretches between special tokens that hold a placeholder as text, and the rest as usual."""
        ids: list[int] = []
        around = ""
        for stretch in self.special_splitter.split(text):
            if PLACEHOLDERS.search(stretch):
                ids += self.encode(around) if around else []
                ids += self._encode_text(self._unmask(stretch))
                around = ""
            else:
                around += stretch
        return ids + (self.encode(around) if around else [])

    def _encode_text(self, text: str) -> list[int]:
        """Encodes the names of special tokens as text."""

        def encode_as_text(part: str) -> list[int]:
            options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
            return list(self.backend([part], split_special_tokens=True, **options)["input_ids"][0])

        ids = encode_as_text(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        # The ordinary vocabulary also has the name, so its first character is encoded apart from the others.
        parts = self.special_names.sub(lambda match: match[0][0] + "\0" + match[0][1:], text).split("\0")
        return [number for part in parts if part for number in encode_as_text(part)]

    def without_opening(self, response: str, prompt: str) -> str:
        """Removes from a response the opening mark, such as `<think>`, with which the prompt's text already ends."""
        mark = OPENING_MARK.search(prompt)
        if mark is None or not response.lstrip().startswith(mark[1]):
            return response
        rest = response.lstrip()[len(mark[1]) :]
        return rest.removeprefix(mark[2])

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes each text as `encode` does, but several times faster."""
        if not texts:
            return []
        encoded = self.backend(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int] | Int32Array) -> str:
        """Returns the text; it keeps only those special tokens that structure a response (MARK_NAME)."""
        numbers: list[int] = np.asarray(ids).tolist()
        skips = self.marks.isdisjoint(numbers)
        if not skips:
            numbers = [number for number in numbers if number not in self.silent_ids]
        text = self.backend.decode(numbers, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        return str(text)

    def check_stop_strings(self, stop_strings: Sequence[str]) -> None:
        """Raises ValueError for a stop string that no sequence of tokens spells, so that no response can hold it."""
        for stop in stop_strings:
            if self.special.get(stop) in self.silent_ids:
                raise ValueError(
                    f"rollout.stop_strings: {stop!r} is a special token, which the text of a response leaves out; "
                    "name it in rollout.stop_tokens"
                )
            doubtful = {char for char in stop if not char.isspace() and char not in self.decode(self.encode(char))}
            if doubtful:
                doubtful -= set("".join(map(self.decode, ([number] for number in range(self.vocab_size)))))
            if doubtful:
                raise ValueError(
                    f"rollout.stop_strings: {stop!r} can never occur, since no token has {min(doubtful)!r}; drop it"
                )

    def stop_token_ids(self, stop_tokens: Sequence[str]) -> list[int]:
        """Returns the end-of-sequence token and then the named tokens, each once.

        Raises ValueError for a name that is not one token of the vocabulary.
        """
        stop_ids = [self.eos_id]
        for name in stop_tokens:
            ids = self.encode(name)
            # Qwen2 names <|endoftext|>, a real token, as its unknown token.
            is_unknown = self.backend.unk_token_id in ids and name != self.backend.unk_token
            if len(ids) != 1 or is_unknown:
                raise ValueError(
                    f"rollout.stop_tokens: {name!r} is not one token of the vocabulary; name a single token or drop it"
                )
            if ids[0] not in stop_ids:
                stop_ids.append(ids[0])
        return stop_ids


def special_tokens(backend: PreTrainedTokenizerBase | SentencePieceBackend) -> dict[str, int]:
    """Returns the ids of the special tokens by name."""
    added: Mapping[int, Any] = backend.added_tokens_decoder
    return {token.content: number for number, token in added.items() if token.special and token.content}


def prefix_ids(backend: PreTrainedTokenizerBase | SentencePieceBackend) -> list[int]:
    """Returns the tokens that the tokenizer itself puts before a text: the BOS token, or none."""
    tokenizer: Any = backend
    for probe in ("1", "a", "x=1"):
        body = list(tokenizer([probe], add_special_tokens=False)["input_ids"][0])
        whole = list(tokenizer([probe], add_special_tokens=True)["input_ids"][0])
        for start in range(len(whole) - len(body) + 1 if body else 0):
            if whole[start : start + len(body)] == body:
                return whole[:start]
    return []


def with_prefix(ids: list[int], prefix: list[int]) -> list[int]:
    """Adds the prefix to a non-empty prompt unless the prompt already begins with it, as a template may write it."""
    return ids if not ids or ids[: len(prefix)] == prefix else [*prefix, *ids]


def has_tokenizer(path: Path) -> bool:
    return any((path / name).is_file() for name in VOCABULARY_FILES)


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer directory without access to a hub. Raises ValueError naming model.tokenizer."""
    if not has_tokenizer(path):
        raise ValueError(f"model.tokenizer: {path} holds no tokenizer; give a directory with tokenizer.json")
    try:
        backend = load_backend(path)
    except Exception as error:  # noqa: BLE001  # The tokenizers library raises nothing more precise.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model.tokenizer: {path} cannot be loaded ({reason}); save the tokenizer again") from None
    if backend.eos_token_id is None:
        raise ValueError(f"model.tokenizer: {path} names no eos_token; set it in tokenizer_config.json")
    return Tokenizer(backend)


def load_backend(path: Path) -> PreTrainedTokenizerBase | SentencePieceBackend:
    if (path / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    if (path / "tokenizer.model").is_file():
        from megatron_oreal.data.sentencepiece_tokenizer import SentencePieceBackend

        return SentencePieceBackend(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)
