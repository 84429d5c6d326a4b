"""Messages to token ids and back, over a Hugging Face tokenizer directory. Imports torch only when one is loaded.

`tokenizer.json` is the definition where there is one: transformers 5 rebuilds the tokenizer of some model types from
its vocabulary alone and then splits text differently.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class Tokenizer:
    """Never adds special tokens by itself: the chat template writes those that a prompt needs."""

    def __init__(self, backend: PreTrainedTokenizerBase | SentencePieceBackend) -> None:
        self.backend: Any = backend
        eos_id: Any = backend.eos_token_id
        self.eos_id: int = eos_id
        self.vocab_size: int = len(backend)  # the added tokens included

    def render_prompt(self, messages: Sequence[Message], config: PromptConfig) -> str:
        """The text that `encode_prompt` encodes: the messages, `config.system_prompt` and `config.suffix`.

        Raises ValueError where the messages do not fit `config`, and for format "chat" without a chat template.
        """
        turns = [(message.role, message.content) for message in messages]
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

    def encode_prompt(self, messages: Sequence[Message], config: PromptConfig) -> list[int]:
        """Token ids of a prompt, the chat template's opening of the answer included. Errors: see `render_prompt`."""
        return self.encode(self.render_prompt(messages, config))

    def encode(self, text: str) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """The same as `encode` of each text, several times faster."""
        if not texts:
            return []
        encoded = self.backend(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def decode(self, ids: Sequence[int] | Int32Array) -> str:
        """The text without special tokens."""
        return str(
            self.backend.decode(np.asarray(ids).tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def stop_token_ids(self, stop_tokens: Sequence[str]) -> list[int]:
        """The end-of-sequence token and then the named ones, each once.

        Raises ValueError for a name that is not one token of the vocabulary.
        """
        stop_ids = [self.eos_id]
        for name in stop_tokens:
            ids = self.encode(name)
            # Qwen2 names <|endoftext|>, a real token, as its unknown one.
            is_unknown = self.backend.unk_token_id in ids and name != self.backend.unk_token
            if len(ids) != 1 or is_unknown:
                raise ValueError(
                    f"rollout.stop_tokens: {name!r} is not one token of the vocabulary; name a single token or drop it"
                )
            if ids[0] not in stop_ids:
                stop_ids.append(ids[0])
        return stop_ids


def load_tokenizer(path: Path) -> Tokenizer:
    """Reads a tokenizer directory; never reaches out to a hub. Raises ValueError naming model.tokenizer."""
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        raise ValueError(f"model.tokenizer: {path} holds no tokenizer; give a directory with tokenizer.json")
    try:
        backend = load_backend(path)
    except Exception as error:  # noqa: BLE001  # the tokenizers library raises nothing more precise for a bad file
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
