"""Wraps a bare sentencepiece `tokenizer.model` (InternLM2, Llama 2) in the few calls that Tokenizer makes.

tokenizer_config.json beside it may name special tokens (`added_tokens_decoder`, `eos_token`) and a chat template. As in
the tokenizers that come with such models, text between special tokens is encoded piece by piece.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from sentencepiece import SentencePieceProcessor

MODEL_FILE = "tokenizer.model"


@dataclass(slots=True, frozen=True)
class AddedToken:
    content: str
    special: bool


class SentencePieceBackend:
    """A sentencepiece tokenizer. Its constructor raises ValueError, KeyError, OSError or RuntimeError for bad files."""

    def __init__(self, path: Path) -> None:
        self.pieces = SentencePieceProcessor(model_file=str(path / MODEL_FILE))
        settings = read_json(path / "special_tokens_map.json") | read_json(path / "tokenizer_config.json")
        # Older directories list the added tokens in a separate file.
        added = {int(number): name for name, number in read_json(path / "added_tokens.json").items()}
        added |= {int(number): token for number, token in settings.get("added_tokens_decoder", {}).items()}
        self.special = {content_of(token): number for number, token in added.items()}
        for number in (self.pieces.bos_id(), self.pieces.eos_id(), self.pieces.unk_id()):
            if number >= 0:
                self.special.setdefault(self.pieces.id_to_piece(number), number)
        self.bos_token, self.eos_token, self.unk_token = (
            self._named(settings, name, number)
            for name, number in (
                ("bos_token", self.pieces.bos_id()),
                ("eos_token", self.pieces.eos_id()),
                ("unk_token", self.pieces.unk_id()),
            )
        )
        named = [self.bos_token, self.eos_token, self.unk_token, settings.get("pad_token")]
        for token in (*named, *(settings.get("additional_special_tokens") or [])):
            # A piece that the configuration names is one token wherever it stands, without the space that
            # sentencepiece puts in front of a text.
            if token and (named_id := self._id(content_of(token))) is not None:
                self.special.setdefault(content_of(token), named_id)
        self.eos_token_id, self.unk_token_id = self._id(self.eos_token), self._id(self.unk_token)
        self.bos_token_id = self._id(self.bos_token)
        pad_token = settings.get("pad_token")
        self.pad_token_id = self._id(content_of(pad_token)) if pad_token else None
        # The tokenizers that come with these models add the token unless the configuration forbids it.
        self.adds_bos = self.bos_token_id is not None and settings.get("add_bos_token") is not False
        self.kept = {number for number, token in added.items() if token_fields(token).get("special") is False}
        template = path / "chat_template.jinja"
        self.chat_template = template.read_text() if template.is_file() else default_template(settings)
        self.splitter = splitter(self.special, added)

    def _named(self, settings: Mapping[str, Any], name: str, number: int) -> str | None:
        if settings.get(name):
            return content_of(settings[name])
        return self.pieces.id_to_piece(number) if number >= 0 else None

    def _id(self, token: str | None) -> int | None:
        if token is None or token in self.special:
            return self.special.get(token or "")
        number = int(self.pieces.piece_to_id(token))
        return None if number == self.pieces.unk_id() else number

    def __len__(self) -> int:
        return max([self.pieces.vocab_size(), *(number + 1 for number in self.special.values())])

    def __call__(
        self,
        texts: Sequence[str],
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        **_options: Any,
    ) -> dict[str, list[list[int]]]:
        """Encodes texts; with `split_special_tokens` it encodes the names of special tokens as text."""
        encode = self.pieces.encode if split_special_tokens else self._encode
        prefix = [self.bos_token_id] if add_special_tokens and self.adds_bos else []
        return {"input_ids": [[*prefix, *encode(text)] for text in texts]}

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """Returns the tokens that are found in a text before it is split into pieces, under transformers' name."""
        return {number: AddedToken(name, number not in self.kept) for name, number in self.special.items()}

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in filter(None, self.splitter.split(text)):
            number = self.special.get(part, self.special.get(part.strip()))
            ids += self.pieces.encode(part) if number is None else [number]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True, **_options: Any) -> str:
        names = {number: name for name, number in self.special.items()}
        texts = []
        for run in runs(ids, names):
            if isinstance(run, list):
                texts.append(str(self.pieces.decode(run)))
            elif not skip_special_tokens or run in self.kept:
                texts.append(names[run])
        return "".join(texts)

    def apply_chat_template(
        self, conversation: Sequence[Mapping[str, str]], tokenize: bool = False, add_generation_prompt: bool = True
    ) -> str:
        assert self.chat_template is not None and not tokenize

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # The functions that transformers offers to templates.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        return environment.from_string(self.chat_template).render(
            messages=conversation,
            add_generation_prompt=add_generation_prompt,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            unk_token=self.unk_token or "",
        )


def read_json(file: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, or an empty one if there is no such file."""
    content: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
    return content


def default_template(settings: Mapping[str, Any]) -> str | None:
    """Returns the default template; a configuration has one text, or several texts by name."""
    found = settings.get("chat_template") or None
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}["default"]
    return found


def splitter(special: Mapping[str, int], added: Mapping[int, str | Mapping[str, Any]]) -> re.Pattern[str]:
    """Returns the pattern that finds special tokens, with the white space around them that belongs to them."""
    fields = {content_of(token): token_fields(token) for token in added.values()}
    patterns = []
    # The longest name comes first, because one special token may begin like another.
    for name in sorted(special, key=len, reverse=True):
        before = r"\s*" if fields.get(name, {}).get("lstrip") else ""
        after = r"\s*" if fields.get(name, {}).get("rstrip") else ""
        patterns.append(before + re.escape(name) + after)
    return re.compile("(" + "|".join(patterns) + ")")


def token_fields(token: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return {} if isinstance(token, str) else token


def content_of(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def runs(ids: Sequence[int], special: Mapping[int, str]) -> Iterator[int | list[int]]:
    """Yields each special token alone, and the other tokens in runs between them."""
    run: list[int] = []
    for number in ids:
        if number not in special:
            run.append(number)
            continue
        if run:
            yield run
        yield number
        run = []
    if run:
        yield run
